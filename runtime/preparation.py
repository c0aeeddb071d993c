"""Requests made ready to run: their arguments checked, their prompts encoded, what drafts and chooses for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypedDict, cast

from runtime.answer import Answer
from runtime.bundle.reading import Bundle
from runtime.bundle.tuning_file import Tuning
from runtime.chat.tools import Tool, read_tools
from runtime.checks import number, whole
from runtime.decode import DecodingState
from runtime.drafting.drafter import Drafter
from runtime.drafting.grammar_drafts import GrammarDrafts
from runtime.drafting.pool_drafts import PoolDrafts
from runtime.drafting.sizing import AdaptiveSizes, FixedSizes, Sizing
from runtime.drafting.source import DraftSource
from runtime.drafting.text_drafts import TextDrafts
from runtime.drafting.text_pool import TextPool
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.errors import InputError, PromptTooLongError, shown
from runtime.grammar import Grammar
from runtime.grammar.calls import function_of, grammar_of_calls
from runtime.grammar.compiler import Compiler, Vocabulary
from runtime.grammar.matcher import Matcher
from runtime.prompts import Prediction, Prompt, PromptEncoder, Tokens
from runtime.request import Delivery
from runtime.sampling import Sampling
from runtime.sampling.noise import Noise
from runtime.sampling.sampler import Sampler
from runtime.sampling.scores import PromptScores
from runtime.scheduling.job import Job
from runtime.token_bytes import TokenBytes
from runtime.tokenizer import encode
from runtime.tools.formats import format_of, named_format, special_markers
from runtime.trace import Trace
from runtime.tree import MOST_ROWS, TreeSizes

MOST_PRIORITY = 1000
# A day.
LONGEST_DEADLINE = 86400.0
# Rows of the longest path where there is no prediction: more of them are hardly ever of use, and take memory.
MOST_COPIED = 24


class RequestOptions(TypedDict, total=False):
    """What a request may say besides its prompt.

    - `max_new_tokens` (256): of the answer, at most; None for as many as context limit and cache have room for, and 0
      with `prompt_logprobs`, for no answer.
    - `stop`: strings that end the answer and are left out of its text.
    - `sampling`: how tokens are chosen, None greedily.
    - `speculate=False` decodes plainly, one token a pass, to the same text, given the same seed.
    - `tree` fixes the row counts of every step, which otherwise adapt to the device, the text and what else runs.
    - `text_pool=False` drafts nothing from the generator's pool of other answers, where it has one, and leaves this one
      out of it.
    - `ngrams=False` drafts nothing from the text itself, and `forced_drafts=False` not what a grammar forces.
    - `prediction`: a text, or `Tokens`, that the answer is expected to be mostly like, such as a file to be edited: it
      is drafted from, and changes no token. At most as long as the context limit. Several prompts may have a list of
      them, None for those without.
    - `raw` takes a string as it is, without the chat template.
    - `escape_special_tokens`: text never becomes special tokens; None leaves that to what the generator was made with.
    - `priority` (0): requests of a higher one run first.
    - `deadline_s`: seconds after which the answer ends as it is then, with `finish_reason` "deadline"; a request that
      has not begun by then raises `DeadlineError`.
    - `prompt_logprobs`: the log-probabilities of the prompt's tokens, and of that many of the best in the place of
      each. All of the prompt is computed then, whatever is kept of earlier ones. Plans cannot.
    - `ignore_stop_tokens`: the answer goes on after a token with which the model ends its text.
    - `tools`: functions that the model may call, as OpenAI's API describes them, for a prompt of chat messages. Calls
      are in the answer's text, with the special tokens that mark them: `Generator.tool_format` parses it. An empty list
      is for messages with earlier calls alone. None leaves messages as `transformers` would have them.
    - `trace`: chunks and the result carry their passes (`runtime.Pass`): what each verified, accepted and made certain.
    """

    max_new_tokens: int | None
    stop: Sequence[str]
    speculate: bool
    raw: bool
    tree: TreeSizes | None
    ngrams: bool
    text_pool: bool
    prediction: Prediction | Sequence[Prediction | None] | None
    forced_drafts: bool
    sampling: Sampling | None
    escape_special_tokens: bool | None
    deadline_s: float | None
    priority: int
    prompt_logprobs: int | None
    ignore_stop_tokens: bool
    tools: Sequence[Tool] | None
    trace: bool


class Preparation:
    """Makes jobs of prompts for the engine of `bundle`, a request of which may take up to `cache_rows` rows, as the
    `option` of that name allows.
    """

    def __init__(
        self,
        bundle: Bundle,
        tuning: Tuning | None,
        cache_rows: int,
        option: str,
        *,
        escape_special_tokens: bool,
        tool_format: str | None = None,
        text_pool: TextPool | None = None,
    ) -> None:
        self._bundle = bundle
        self._text_pool = text_pool
        self.about = bundle.about
        self.tuning = tuning
        self._cache_rows = cache_rows
        self._option = option
        # Rows that a tree may have for a long path of text, if these are more than on the menu.
        self.longest_path = 0
        # What makes the sources that somebody has added; see `Generator.add_draft_source`.
        self.more_sources: list[Callable[[], DraftSource]] = []
        template = bundle.chat.source if bundle.chat else ""
        self.tool_format = format_of(template, bundle.tokenizer) if tool_format is None else named_format(tool_format)
        self.tool_markers = special_markers(self.tool_format, bundle.tokenizer)
        self._prompts = PromptEncoder(bundle.tokenizer, bundle.chat, self.about.dims.vocab_size, self.tool_format)
        self._escape = escape_special_tokens
        self.grammars = Compiler(lambda: vocabulary_of(bundle))

    def encode(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        escape_special_tokens: bool | None = None,
        limit: int | None = None,
        tools: Sequence[Tool] | None = None,
    ) -> list[int]:
        """Return the token ids of a prompt; see `Generator.encode` and `PromptEncoder.encode`."""
        escape = self._escape if escape_special_tokens is None else escape_special_tokens
        return self._prompts.encode(prompt, raw=raw, escape_special_tokens=escape, limit=limit, tools=tools)

    def tool_grammar(self, tools: Sequence[Tool], *, name: str | None, required: bool, parallel: bool) -> Grammar:
        """See `Generator.tool_grammar`; without `required`, arguments are those of a schema where a tool is strict."""
        known = read_tools(tools)
        strict = {tool["function"]["name"] for tool in tools if required or tool["function"].get("strict")}
        functions = [
            function_of(tool, fits=tool["function"]["name"] in strict)
            for tool in known
            if name in (None, tool["function"]["name"])
        ]
        if not functions:
            raise InputError(f"there is no tool {shown(name)}; give one of those that there are")
        text = grammar_of_calls(
            self.tool_format, functions, self.tool_markers, required=required, parallel=parallel and name is None
        )
        return Grammar.lark(text)

    def prepare(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = 256,
        stop: Sequence[str] = (),
        speculate: bool = True,
        raw: bool = False,
        tree: TreeSizes | None = None,
        ngrams: bool = True,
        text_pool: bool = True,
        prediction: Prediction | Sequence[Prediction | None] | None = None,
        forced_drafts: bool = True,
        sampling: Sampling | None = None,
        escape_special_tokens: bool | None = None,
        deadline_s: float | None = None,
        priority: int = 0,
        prompt_logprobs: int | None = None,
        ignore_stop_tokens: bool = False,
        tools: Sequence[Tool] | None = None,
        trace: bool = False,
    ) -> tuple[Job, Delivery]:
        """Return the job, and where its answer is delivered to; see `RequestOptions`. Raises `InputError` for what does
        not fit, of it `PromptTooLongError` when the prompt leaves no room within the context limit.
        """
        if max_new_tokens is not None:
            whole("max_new_tokens", max_new_tokens, 1 if prompt_logprobs is None else 0)
        if not isinstance(stop, Sequence) or isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop must be a list of strings that are not empty, not {shown(stop)}")
        if sampling is None:
            sampling = Sampling()
        _check_sampling(sampling, max_new_tokens)
        deadline = None
        if deadline_s is not None:
            deadline = time.monotonic() + number("deadline_s", deadline_s, 0.0, LONGEST_DEADLINE)
        priority = whole("priority", priority, -MOST_PRIORITY, MOST_PRIORITY)
        sizing = self._sizing(tree, speculate)
        limit = self.about.max_context
        ids = self.encode(prompt, raw=raw, escape_special_tokens=escape_special_tokens, limit=limit, tools=tools)
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        room = self.about.max_context - len(ids)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, and the engine's context limit is {self.about.max_context} for "
                "prompt and answer together; shorten the prompt"
            )
        dims = self.about.dims
        stop_tokens = () if ignore_stop_tokens else self.about.stop_tokens
        scores = self._scores(prompt_logprobs)
        matcher = self._matcher(sampling, ignore_stop_tokens=ignore_stop_tokens)
        sampler = Sampler(sampling, ids, dims.vocab_size, stop_tokens, matcher)
        shaped = None if matcher is None else GrammarDrafts(matcher, forced=forced_drafts)
        predicted = self._predicted(prediction)
        text = TextDrafts(predicted, stop_tokens, itself=ngrams) if speculate and (ngrams or predicted) else None
        markers = self.tool_markers.values() if tools else ()
        answer = Answer(self._bundle.tokenizer, stop, stop_tokens, sampler, text, markers)
        beside = len(ids) + sizing.most_rows * (1 + dims.num_steps)
        # Where the cache has room for none, it is told below.
        wanted = max(1, self._cache_rows - beside) if max_new_tokens is None else max_new_tokens
        most = min(wanted, room)
        pool = self._text_pool if text_pool else None
        others = PoolDrafts(pool) if pool is not None and speculate else None
        if (text is not None or others is not None) and isinstance(sizing, AdaptiveSizes):
            # Long paths take none of an answer's room.
            spare = self._cache_rows - len(ids) - most
            longest = self.longest_path if predicted else min(self.longest_path, MOST_COPIED)
            sizing = sizing.with_longer_paths(min(longest, spare // (1 + dims.num_steps)))
        drafter = self._drafter(sizing, sampling.temperature, sampler.noise, text, shaped, others)
        state = DecodingState(
            ids, drafter, self.about.prompt_chunk, dims.join_order, sampler, most, answer.ends, scores=scores
        )
        state.trace = Trace() if trace else None
        rows = most + len(ids) + sizing.most_rows * (1 + dims.num_steps)
        if rows > self._cache_rows:
            raise InputError(
                f"the prompt's {len(ids)} tokens and up to {most} new ones need {rows} rows of the cache, and "
                f"{self._option} allows {self._cache_rows}; raise it, or lower max_new_tokens"
            )
        delivery = Delivery(answer, None if pool is None else pool.add)
        return Job(state, rows, priority, deadline, delivery), delivery

    def new_drafter(
        self,
        sizing: Sizing,
        temperature: float = 0.0,
        noise: Noise | None = None,
        *,
        ngrams: bool = True,
    ) -> Drafter:
        """Return what drafts one text with the engine's own statistics, greedily or for sampling at `temperature` with
        `noise`; `ngrams=False` leaves out continuations from the text itself.
        """
        return self._drafter(sizing, temperature, noise, TextDrafts() if ngrams else None)

    def _drafter(
        self,
        sizing: Sizing,
        temperature: float,
        noise: Noise | None,
        text: TextDrafts | None,
        grammar: GrammarDrafts | None = None,
        others: PoolDrafts | None = None,
    ) -> Drafter:
        bundle = self._bundle
        layers = TransferDrafts(bundle.correction, bundle.reliability, temperature, noise, bundle.foresight)
        sources: list[DraftSource] = [layers]
        if text is not None:
            sources.append(text)
        if others is not None:
            sources.append(others)
        sources += [make() for make in self.more_sources]
        return Drafter(sizing, sources, bundle.draft_tokens, grammar)

    def _matcher(self, sampling: Sampling, *, ignore_stop_tokens: bool) -> Matcher | None:
        if sampling.grammar is None:
            return None
        if ignore_stop_tokens:
            raise InputError(
                "ignore_stop_tokens cannot be had with a grammar, which says itself where the answer may end; leave "
                "one of them out"
            )
        return self.grammars.matcher(sampling.grammar)

    def _predicted(self, prediction: object) -> list[int]:
        if prediction is None:
            return []
        if isinstance(prediction, list | tuple) and not isinstance(prediction, Tokens):
            raise InputError(
                "a list of predictions is for generate() with a list of prompts, one for each; give one string or "
                "runtime.Tokens"
            )
        return self._prompts.encode_prediction(cast(Prediction, prediction), self.about.max_context)

    def _scores(self, count: int | None) -> PromptScores | None:
        if count is None:
            return None
        vocab_size = self.about.dims.vocab_size
        whole("prompt_logprobs", count, 1, vocab_size)
        if self.about.plan is not None:
            raise InputError(
                "prompt_logprobs cannot be had of a plan, which has the logits of a prompt's last token alone; use "
                "an .onnx engine, or leave it out"
            )
        return PromptScores(count, vocab_size)

    def _sizing(self, tree: TreeSizes | None, speculate: bool) -> Sizing:
        steps = self.about.dims.num_steps
        if not speculate:
            if tree is not None:
                raise InputError("tree has no meaning with speculate=False; leave one of them out")
            return FixedSizes(TreeSizes.plain(steps))
        if tree is None and self.tuning is not None:
            return AdaptiveSizes(self.tuning.menu, self.tuning.rate, self.tuning.draft_value)
        return FixedSizes(self._checked(tree or self.about.tree))

    def _checked(self, sizes: TreeSizes) -> TreeSizes:
        if not isinstance(sizes, TreeSizes) or not isinstance(sizes.pseudo_rows, Sequence):
            raise InputError(f"tree must be a runtime.TreeSizes such as TreeSizes(4, (4, 2, 2)), not {shown(sizes)}")
        whole("tree_rows", sizes.tree_rows, 1, MOST_ROWS)
        for rows in sizes.pseudo_rows:
            whole("each of pseudo_rows", rows, 0, sizes.tree_rows)
        steps = self.about.dims.num_steps
        if len(sizes.pseudo_rows) != steps or any(sizes.pseudo_rows[sizes.draft_steps :]):
            raise InputError(
                f"pseudo_rows must be {steps} numbers, one for each draft step of this engine, with none after a 0: a "
                f"step is of use only after those before it; not {sizes.pseudo_rows}"
            )
        plan = self.about.plan
        if plan and (most := max(sizes.tree_rows, *sizes.pseudo_rows)) > plan.limits.max_rows:
            raise InputError(
                f"{sizes} does not fit: this plan was built for up to {plan.limits.max_rows} rows of each kind; use "
                f"fewer, or export it again with --max-rows {most}"
            )
        return sizes


def _check_sampling(sampling: object, max_new_tokens: int | None) -> None:
    if not isinstance(sampling, Sampling):
        raise InputError(f"sampling must be a runtime.Sampling, not {shown(sampling)}")
    if max_new_tokens is None:
        return
    if sampling.min_new_tokens > max_new_tokens:
        raise InputError(
            f"min_new_tokens is {sampling.min_new_tokens}, more than max_new_tokens, {max_new_tokens}; change one of "
            "them"
        )
    for index in sampling.forced_tokens:
        if index >= max_new_tokens:
            raise InputError(
                f"forced_tokens has new token {index}, and max_new_tokens is {max_new_tokens}; change one of them"
            )


def vocabulary_of(bundle: Bundle) -> Vocabulary:
    """Return what grammars have to know of an engine's tokenizer, which takes a second or more."""
    about, found = bundle.about, TokenBytes(bundle.tokenizer)
    size = about.dims.vocab_size
    return Vocabulary(
        [found[token] for token in range(size)],
        found.special(),
        about.stop_tokens,
        lambda text: encode(bundle.tokenizer, text, size, add_special_tokens=False),
        found.changed_first(),
    )
