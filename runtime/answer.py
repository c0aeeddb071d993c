"""An answer as it comes: the text and the statistics of one request, step by step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from runtime.decode import DecodingState
from runtime.drafting.text_drafts import TextDrafts
from runtime.sampling import TokenLogProbability
from runtime.sampling.sampler import Sampler
from runtime.trace import Pass

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FinishReason = Literal["stop", "length", "deadline"]


@dataclass(frozen=True)
class GenerationResult:
    """An answer and how it came about.

    `tokens` are the new token ids, an end-of-text token included; `text` leaves special tokens out and ends before a
    stop string. `finish_reason` is "stop" (end of text, or a stop string), "length" (token or context limit) or
    "deadline". `cached_prompt_tokens` of the prompt were there already, from a prompt that began alike.
    `steps` counts the engine passes that made tokens certain, the prompt's last one included, so that
    `tokens_per_step` is tokens / steps and 1.0 for plain decoding. `time_to_first_token_s` is from the time that the
    request was made, also while it waited for others. `decode_tokens_per_second` leaves the prompt and the first token
    out; it is 0.0 when there was no second token. `accepted[n]` counts the steps that accepted n drafted tokens and so
    yielded n + 1: all but the prompt's, and the last one, which the answer's end cut short. `seed` is the one that
    sampling used, None for greedy decoding. `log_probabilities` has an entry for each token, if asked for, and
    `prompt_log_probabilities` for each of the prompt, None for its first. All passes together verified `candidates`
    drafted tokens, and accepted `accepted_candidates` of them. The prediction of the answer, if there was one to draft
    from, has `prediction_tokens`, of which `found_prediction_tokens` were found in the answer. `passes` are all passes,
    where a trace was asked for.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    cached_prompt_tokens: int
    finish_reason: FinishReason
    steps: int
    tokens_per_step: float
    decode_tokens_per_second: float
    time_to_first_token_s: float
    accepted: tuple[int, ...]
    seed: int | None
    log_probabilities: list[TokenLogProbability] | None
    prompt_log_probabilities: list[TokenLogProbability | None] | None = None
    candidates: int = 0
    accepted_candidates: int = 0
    prediction_tokens: int = 0
    found_prediction_tokens: int = 0
    passes: list[Pass] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class GenerationChunk:
    """A part of an answer: text that is final, and the tokens of one engine pass, with their log-probabilities if
    asked for; they became certain `seconds` after the request was made. The last one carries the result. Where a trace
    was asked for, `passes` has that pass, and before the first token all passes of the prompt.
    """

    text: str
    tokens: list[int] = field(default_factory=list)
    result: GenerationResult | None = None
    log_probabilities: list[TokenLogProbability] | None = None
    seconds: float = 0.0
    passes: list[Pass] | None = None


class Answer:
    """The part of a request's answer that has come: call `step` after each step that made tokens certain.

    `ends` is for `DecodingState.ends`: text decides where an answer ends, by its `stop` strings as well as by
    `stop_tokens`. Special tokens that are `shown` are in the text. `text_drafts` know how much of a prediction it has.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        stop_tokens: Iterable[int],
        sampler: Sampler,
        text_drafts: TextDrafts | None = None,
        shown: Collection[int] = (),
    ) -> None:
        from runtime.text import TextStream

        self._text = TextStream(tokenizer, stop, shown)
        self._stop_tokens = frozenset(stop_tokens)
        self._sampler = sampler
        self._text_drafts = text_drafts
        self._released: list[str] = []
        self._count = 0
        self._stopped = False
        # Times of `time.perf_counter`: the beginning, the first token and the last.
        self._made = time.perf_counter()
        self._first = self._last = self._made
        self._steps = 0
        self._accepted: Counter[int] = Counter()
        self._passes: list[Pass] = []

    def ends(self, token: int) -> bool:
        """Take the next token; return whether the answer ends with it."""
        self._released.append(self._text.push(token))
        self._stopped = self._text.stopped or token in self._stop_tokens or self._sampler.complete
        return self._stopped

    def step(self, state: DecodingState, cached: int = 0) -> GenerationChunk:
        """Return the chunk of the tokens that became certain since the last one; the last one carries the result.
        `cached` counts the tokens of the prompt that were there already.
        """
        certain, scores = state.tokens[self._count :], self._sampler.log_probabilities
        if certain:
            self._last = time.perf_counter()
            if not self._count:
                self._first = self._last
            elif not state.ended:
                self._accepted[len(certain) - 1] += 1
            self._steps += 1
        if state.ended:
            self._released.append(self._text.finish())
        text = "".join(self._released)
        passes = self._traced(state)
        self._released.clear()
        part = scores and scores[self._count :]
        self._count += len(certain)
        result = self._result(state, cached) if state.ended else None
        return GenerationChunk(text, certain, result, part, time.perf_counter() - self._made, passes)

    def _traced(self, state: DecodingState) -> list[Pass] | None:
        """Return the passes since the last chunk, with the text that each of their tokens has released; None where
        there is no trace.
        """
        if state.trace is None:
            return None
        place, known = 0, len(self._passes)
        for one in state.trace.take():
            end = place + len(one.tokens)
            self._passes.append(replace(one, texts=tuple(self._released[place:end])))
            place = end
        # What was held back to the end belongs to the last token.
        if (held_back := "".join(self._released[place:])) and self._passes:
            *texts, last = self._passes[-1].texts
            self._passes[-1] = replace(self._passes[-1], texts=(*texts, last + held_back))
        return self._passes[known:]

    def _result(self, state: DecodingState, cached: int) -> GenerationResult:
        tokens, steps, decoding = state.tokens, self._steps, self._last - self._first
        limited = len(tokens) >= state.max_new_tokens
        drafts = self._text_drafts
        if drafts is not None and drafts.prediction_tokens:
            # While it rested it was told nothing.
            state.drafter.catch_up()
        return GenerationResult(
            text=self._text.text,
            tokens=tokens,
            prompt_tokens=len(state.prompt),
            cached_prompt_tokens=cached,
            finish_reason="stop" if self._stopped else "length" if limited else "deadline",
            steps=steps,
            tokens_per_step=len(tokens) / steps if steps else 0.0,
            decode_tokens_per_second=(len(tokens) - 1) / decoding if decoding else 0.0,
            time_to_first_token_s=self._first - self._made,
            accepted=tuple(self._accepted[n] for n in range(max(self._accepted, default=-1) + 1)),
            seed=self._sampler.seed,
            log_probabilities=self._sampler.log_probabilities,
            prompt_log_probabilities=None if state.scores is None else state.scores.found,
            candidates=state.candidates,
            accepted_candidates=state.accepted,
            prediction_tokens=drafts.prediction_tokens if drafts else 0,
            found_prediction_tokens=drafts.found if drafts else 0,
            passes=None if state.trace is None else self._passes,
        )
