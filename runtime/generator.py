"""`Generator`: text from an exported engine, for embedding in programs and services."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from runtime import driver, tokenizer
from runtime.answer import Answer, GenerationChunk, GenerationResult
from runtime.bundle.engine_file import EngineFile
from runtime.bundle.reading import read_bundle
from runtime.bundle.tuning_file import Tuning
from runtime.checks import check_threads, whole
from runtime.decode import Request
from runtime.drafting.drafter import Drafter
from runtime.drafting.ngrams import Ngrams
from runtime.drafting.sizing import AdaptiveSizes, FixedSizes, Sizing
from runtime.drafting.source import DraftSource
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.engines.opening import open_engine, runs_on_cpu
from runtime.engines.protocol import Engine
from runtime.errors import InputError, PromptTooLongError, shown
from runtime.files import check_readable
from runtime.prompts import Prompt, PromptEncoder
from runtime.sampling import Sampling
from runtime.sampling.noise import Noise
from runtime.sampling.sampler import Sampler
from runtime.tree import MOST_ROWS, TreeSizes
from runtime.tuning import device_name, load_or_measure


class Generator:
    """Decoding on an exported engine. One generator serves one request at a time; another thread that asks meanwhile
    gets an `InputError`.

    Raises `EngineFileError` when the engine's files are missing, damaged or of another version, and `InputError` for
    an engine that cannot run here. `device` "cpu" or "cuda" is where an ONNX engine runs, None on the CPU; plans run on
    the GPU always. `threads` is for the CPU; `InputWarning` tells of more than this process has cores. With `adapt` the
    sizes of trees are those that pay on this device and for this text. On a CPU the times of steps are measured the
    first time, which takes some seconds, and kept beside the engine; on a GPU `ht-bench tune` does so. Without them, or
    without `adapt`, sizes are the engine's own. `verify_weights=False` skips hashing the weights when loading (their
    size is always checked). With `escape_special_tokens` the text of a prompt never becomes special tokens, as
    `<|im_end|>` in a message otherwise does; each request may say it anew.
    """

    def __init__(
        self,
        engine: str | Path,
        *,
        device: str | None = None,
        threads: int | None = None,
        adapt: bool = True,
        verify_weights: bool = True,
        escape_special_tokens: bool = False,
    ) -> None:
        path = Path(engine)
        check_readable(path)
        if threads is not None:
            check_threads(threads)
        self._bundle = read_bundle(path, verify_weights=verify_weights)
        self.about: EngineFile = self._bundle.about
        self._prompts = PromptEncoder(self._bundle.tokenizer, self._bundle.chat, self.about.dims.vocab_size)
        self._escape = escape_special_tokens
        with self._bundle.files as files:
            self.engine: Engine = open_engine(files, self.about, device, threads)
        self._in_use = threading.Lock()
        self.tuning: Tuning | None = None
        if adapt:
            name = device_name(self.engine, threads)
            on_cpu = runs_on_cpu(self.about, device)
            self.tuning = load_or_measure(path, self.engine, self.about, name, self.new_drafter, on_cpu=on_cpu)

    def __reduce__(self) -> NoReturn:
        # What `pickle`, `copy` and process pools report of anything that they cannot handle is a TypeError.
        raise TypeError(
            "a Generator cannot be pickled or copied: it holds an engine's session and memory; make one in each "
            "process, from the engine's path"
        )

    def encode(self, prompt: Prompt, *, raw: bool = False, escape_special_tokens: bool | None = None) -> list[int]:
        """Return the token ids of a prompt: of chat messages, of a string as one user message, or (`raw`, or a model
        without a chat template) of the string as it is. Any number of them: the context limit is for `stream`.

        As in `transformers`, text that spells a special token becomes that token; with `escape_special_tokens` only
        the template's own does, and messages (all texts in them) and strings are encoded as text. None leaves that to
        what the generator was made with.
        """
        return self._encode(prompt, raw, escape_special_tokens, None)

    def _encode(self, prompt: Prompt, raw: bool, escape: bool | None, limit: int | None) -> list[int]:
        escape = self._escape if escape is None else escape
        return self._prompts.encode(prompt, raw=raw, escape_special_tokens=escape, limit=limit)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, without special ones. Raises `InputError` for what is no token."""
        return tokenizer.decode(self._bundle.tokenizer, tokens)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        speculate: bool = True,
        raw: bool = False,
        tree: TreeSizes | None = None,
        ngrams: bool = True,
        sampling: Sampling | None = None,
        escape_special_tokens: bool | None = None,
    ) -> GenerationResult:
        """Return the base model's answer to `prompt`; parameters as for `stream`."""
        for chunk in self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            stop=stop,
            speculate=speculate,
            raw=raw,
            tree=tree,
            ngrams=ngrams,
            sampling=sampling,
            escape_special_tokens=escape_special_tokens,
        ):
            if chunk.result is not None:
                return chunk.result
        raise AssertionError("a stream ends with its result")

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        speculate: bool = True,
        raw: bool = False,
        tree: TreeSizes | None = None,
        ngrams: bool = True,
        sampling: Sampling | None = None,
        escape_special_tokens: bool | None = None,
    ) -> Iterator[GenerationChunk]:
        """Yield the base model's answer to `prompt` as it comes.

        `sampling` says how tokens are chosen, None greedily. `speculate=False` decodes plainly, one token a pass, to
        the same text, given the same seed. `stop` strings end the answer and are left out of its text. `tree` fixes the
        row counts of every step, which otherwise adapt to the device and to the text. `ngrams=False` drafts nothing
        from the text itself. `escape_special_tokens` as for `encode`. Arguments are checked before the first chunk is
        asked for, and a prompt that is clearly too long is refused without reading it to its end. Raises
        `PromptTooLongError` when the prompt leaves no room within the context limit, and `InputError` for any other
        argument that does not fit; also later, when `sampling` leaves no token to choose.
        """
        max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
        if not isinstance(stop, Sequence) or isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop must be a list of strings that are not empty, not {shown(stop)}")
        if sampling is None:
            sampling = Sampling()
        if not isinstance(sampling, Sampling):
            raise InputError(f"sampling must be a runtime.Sampling, not {shown(sampling)}")
        if sampling.min_new_tokens > max_new_tokens:
            raise InputError(
                f"min_new_tokens is {sampling.min_new_tokens}, more than max_new_tokens, {max_new_tokens}; change one "
                "of them"
            )
        for index in sampling.forced_tokens:
            if index >= max_new_tokens:
                raise InputError(
                    f"forced_tokens has new token {index}, and max_new_tokens is {max_new_tokens}; change one of them"
                )
        sizing = self._sizing(tree, speculate)
        ids = self._encode(prompt, raw, escape_special_tokens, self.about.max_context)
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        room = self.about.max_context - len(ids)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, and the engine's context limit is {self.about.max_context} for "
                "prompt and answer together; shorten the prompt"
            )
        dims = self.about.dims
        sampler = Sampler(sampling, ids, dims.vocab_size, self.about.stop_tokens)
        drafter = self.new_drafter(sizing, sampling.temperature, sampler.noise, ngrams=ngrams and speculate)
        answer = Answer(self._bundle.tokenizer, stop, self.about.stop_tokens, sampler)
        most = min(max_new_tokens, room)
        request = Request(ids, drafter, self.about.prompt_chunk, dims.join_order, sampler, most, answer.ends)
        return self._run(request, answer)

    def new_drafter(
        self, sizing: Sizing, temperature: float = 0.0, noise: Noise | None = None, *, ngrams: bool = True
    ) -> Drafter:
        """Return what drafts one text with the engine's own statistics, greedily or for sampling at `temperature` with
        `noise`; `ngrams=False` leaves out continuations from the text itself.
        """
        bundle = self._bundle
        sources: list[DraftSource] = [TransferDrafts(bundle.correction, bundle.reliability, temperature, noise)]
        if ngrams:
            sources.append(Ngrams())
        return Drafter(sizing, sources)

    def _run(self, request: Request, answer: Answer) -> Iterator[GenerationChunk]:
        steps = driver.run(self.engine, [request])
        while not request.ended:
            count = len(request.tokens)
            started = time.perf_counter()
            # The chunks of a prompt, and the pass after them that makes a token certain.
            with self._used():
                while len(request.tokens) == count:
                    next(steps)
            yield answer.step(request, time.perf_counter() - started)

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        """Keep the engine for one step: its outputs hold until the next one."""
        if not self._in_use.acquire(blocking=False):
            raise InputError(
                "this generator is at work for another thread, or calls itself from a processor; take turns, or load "
                "one for each"
            )
        try:
            yield
        finally:
            self._in_use.release()

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
