"""`Sampler`: the base model's own choice of each token, for decoding with or without speculation.

The draft-and-verify loop asks for one choice for each token that it emits, in order, as plain decoding does. A choice
may therefore depend on everything before it: counts for penalties, the state of the user's processors, the place in
the text, which the noise depends on. With the same seed both ways of decoding give the same text.

A choice that depends on one row of logits alone is left to the engine: see `Sampler.wanted`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.grammar.matcher import Matcher
from runtime.sampling.candidates import largest
from runtime.sampling.choice import ArgMax, Choice, Chosen, Race, Wanted, WholeLogits
from runtime.sampling.noise import Noise
from runtime.sampling.options import LogitsProcessor, Sampling, TokenLogProbability
from runtime.sampling.tokens import TokensSoFar

# A fresh seed is exact in every JSON reader.
SEED_BITS = 53
LARGEST_LOGIT = float(np.finfo(np.float32).max)


class Sampler:
    """Chooses the tokens of one answer to a prompt, one for each call.

    `wanted` is what it wants back of each row of logits. `seed` is the one in use and `noise` its noise, None for
    greedy decoding; `log_probabilities` has an entry for each token chosen, and is None where `settings` do not ask for
    them. `stop_tokens` are the model's. `matcher`, of the answer's beginning, is that of the settings' grammar. Raises
    `InputError` for `settings` that do not fit the vocabulary or the stop tokens.
    """

    def __init__(
        self,
        settings: Sampling,
        prompt_tokens: Sequence[int],
        vocab_size: int,
        stop_tokens: Iterable[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        stops = frozenset(stop_tokens)
        _check_fit(settings, vocab_size, stops)
        self._settings = settings
        self.matcher = matcher
        self._tokens = list(prompt_tokens)
        self._readable = TokensSoFar(self._tokens)
        self._new_tokens = 0
        self._biased = np.array(list(settings.logit_bias), dtype=np.int64)
        self._biases = np.array(list(settings.logit_bias.values()), dtype=np.float32)
        self._banned = np.array(settings.banned_tokens, dtype=np.int64)
        self._stops = np.array([token for token in stops if token < vocab_size], dtype=np.int64)
        self._seen: TokenCounts | None = None
        if settings.repetition_penalty != 1.0:
            self._seen = TokenCounts(vocab_size, self._tokens)
        self._answered: TokenCounts | None = None
        if settings.presence_penalty or settings.frequency_penalty:
            self._answered = TokenCounts(vocab_size)
        self._processes = bool(
            settings.logit_bias
            or self._seen is not None
            or self._answered is not None
            or settings.banned_tokens
            or settings.min_new_tokens
            or settings.forced_tokens
            or settings.processors
            or matcher is not None
        )
        self._logits = np.empty(vocab_size, dtype=np.float32)
        self.log_probabilities: list[TokenLogProbability] | None = [] if settings.logprobs else None
        self.seed: int | None = None
        self.noise: Noise | None = None
        self._last_step: ArgMax | Race = ArgMax()
        if settings.temperature:
            self.seed = secrets.randbits(SEED_BITS) if settings.seed is None else settings.seed
            self.noise = Noise(self.seed, len(self._tokens))
            self._last_step = Race(
                self.noise, vocab_size, settings.temperature, settings.top_k, settings.top_p, settings.min_p
            )
        needs_all = self._processes or self.log_probabilities is not None
        self.wanted: Wanted = WholeLogits() if needs_all else self._last_step

    def __call__(self, found: Choice) -> int:
        """Return the next token, where `found` is what was `wanted` of the base model's logits after all tokens before
        it. Logits [V] will do always, and stay as they are.

        Raises `InputError` when no token may be chosen, or when a processor returns something else than logits.
        """
        chosen = found if isinstance(found, Chosen) else self._choose(found)
        self._check_largest(chosen.top)
        token = chosen.token
        if self.log_probabilities is not None:
            assert not isinstance(found, Chosen), "log-probabilities are of whole logits"
            self.log_probabilities.append(log_probability(found, token, self._settings.logprobs, self._logits))
        self._tokens.append(token)
        self._new_tokens += 1
        for counts in (self._seen, self._answered):
            if counts is not None:
                counts.add(token)
        if self.matcher is not None:
            self.matcher.accept(token)
        return token

    @property
    def complete(self) -> bool:
        """Return whether there is a grammar, and nothing can follow but the answer's end."""
        return self.matcher is not None and self.matcher.complete

    def _choose(self, logits: NDArray[np.float32]) -> Chosen:
        processed = self._process(logits) if self._processes else logits
        return self._last_step.choose(processed, len(self._tokens))

    def _process(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        settings = self._settings
        out = self._logits
        np.copyto(out, logits)
        out[self._biased] += self._biases
        if self._seen is not None:
            values, penalty = out[self._seen.tokens], settings.repetition_penalty
            out[self._seen.tokens] = np.where(values < 0, values * penalty, values / penalty)
        if self._answered is not None:
            answered = self._answered
            out[answered.tokens] -= settings.frequency_penalty * answered.counts + settings.presence_penalty
        out[self._banned] = -np.inf
        if self._new_tokens < settings.min_new_tokens:
            out[self._stops] = -np.inf
        if (forced := settings.forced_tokens.get(self._new_tokens)) is not None:
            out.fill(-np.inf)
            out[forced] = 0.0
        for index, processor in enumerate(settings.processors):
            # A copy is the processor's to keep and to write into; what it returns may be its own too.
            try:
                out = processor(self._readable, out.copy())
            except StopIteration as error:
                # In a generator, as decoding is, it would become a RuntimeError that says nothing of processors.
                raise InputError(
                    f"{_name(index, processor)} raised StopIteration; let it raise another error"
                ) from error
            _check_processed(out, index, processor, logits.shape, settings.temperature)
        if self.matcher is not None:
            out = np.where(self.matcher.allowed(), out, np.float32(-np.inf))
        return out

    def _check_largest(self, logit: float) -> None:
        if logit == -math.inf:
            raise InputError(
                f"no token is left for new token {self._new_tokens}: banned_tokens, min_new_tokens, processors and "
                "grammar rule out every one; let them leave at least one"
            )
        if not math.isfinite(logit):
            raise InputError(
                f"the engine's logits for new token {self._new_tokens} hold {logit}: its numbers overflow; export it "
                "again with another --precision"
            )


class TokenCounts:
    """Counts of the `tokens` [N] that have come, each once: `counts` [N]. One is added in constant time."""

    def __init__(self, vocab_size: int, tokens: Sequence[int] = ()) -> None:
        # A prompt may have tokens that the model cannot choose.
        known = [token for token in tokens if token < vocab_size]
        self._counts = np.bincount(np.array(known, dtype=np.int64), minlength=vocab_size).astype(np.float32)
        present = np.flatnonzero(self._counts)
        self._tokens = np.empty(vocab_size, dtype=np.int64)
        self._size = len(present)
        self._tokens[: self._size] = present

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The tokens that have come."""
        return self._tokens[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """The number of times that each of `tokens` has come."""
        return self._counts[self.tokens]

    def add(self, token: int) -> None:
        """Count one more `token`."""
        if not self._counts[token]:
            self._tokens[self._size] = token
            self._size += 1
        self._counts[token] += 1


def log_probability(
    logits: NDArray[np.float32], token: int, count: int, scratch: NDArray[np.float32]
) -> TokenLogProbability:
    """Return the log-probabilities of `token` and of the `count` best under a softmax over logits [V].

    Among equals the smaller token comes first. `scratch` [V] is overwritten.
    """
    top = logits.max()
    np.exp(np.subtract(logits, top, out=scratch), out=scratch)
    total = float(top) + math.log(scratch.sum(dtype=np.float64))
    near = largest(logits, count)
    best = near[np.lexsort((near, -logits[near]))[:count]]
    return TokenLogProbability(token, float(logits[token]) - total, [(int(t), float(logits[t]) - total) for t in best])


def _check_fit(settings: Sampling, vocab_size: int, stop_tokens: Collection[int]) -> None:
    named = {
        "logit_bias": settings.logit_bias,
        "banned_tokens": settings.banned_tokens,
        "forced_tokens": settings.forced_tokens.values(),
    }
    for name, tokens in named.items():
        for token in tokens:
            if token >= vocab_size:
                raise InputError(f"{name} has token {token}; this model's tokens are 0 to {vocab_size - 1}")
    if settings.logprobs > vocab_size:
        raise InputError(f"logprobs must be at most {vocab_size}, the size of the vocabulary, not {settings.logprobs}")
    for index, token in settings.forced_tokens.items():
        if index < settings.min_new_tokens and token in stop_tokens:
            raise InputError(
                f"forced_tokens ends the answer with stop token {token} as new token {index}, and min_new_tokens is "
                f"{settings.min_new_tokens}; change one of them"
            )


def _name(index: int, processor: LogitsProcessor) -> str:
    return f"processor {index} ({getattr(processor, '__name__', type(processor).__name__)})"


def _check_processed(
    logits: NDArray[np.float32], index: int, processor: LogitsProcessor, shape: tuple[int, ...], temperature: float
) -> None:
    name = _name(index, processor)
    # What is masked would be chosen all the same.
    if not isinstance(logits, np.ndarray) or isinstance(logits, np.ma.MaskedArray):
        raise InputError(f"{name} returned {type(logits).__name__}; it must return an array of logits")
    if logits.shape != shape or logits.dtype != np.float32:
        raise InputError(
            f"{name} returned {logits.dtype} {list(logits.shape)}; it must return logits of float32 {list(shape)}"
        )
    if not (top := float(logits.max())) < np.inf:
        raise InputError(f"{name} returned logits that hold {top}; they must be numbers, or -inf to rule a token out")
    if top > LARGEST_LOGIT * (temperature or 1.0):
        raise InputError(
            f"{name} returned logits that hold {top:g}; divided by temperature {temperature:g} it overflows; let it "
            "rule the other tokens out by -inf"
        )
