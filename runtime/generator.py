"""`Generator`: text from an exported engine, for embedding in programs and services."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self, Unpack, overload

from runtime import tokenizer
from runtime.answer import GenerationChunk, GenerationResult
from runtime.bundle.engine_file import EngineFile
from runtime.bundle.reading import EngineFiles, read_bundle
from runtime.bundle.tuning_file import Tuning
from runtime.chat.tools import Tool
from runtime.checks import check_threads, number, whole
from runtime.drafting.drafter import Drafter
from runtime.drafting.sizing import LONG_PATHS, Sizing
from runtime.drafting.source import DraftSource
from runtime.drafting.text_pool import MOST_TOKENS, TextPool
from runtime.engines.device_engine import DeviceEngine
from runtime.engines.opening import open_engine, runs_on_cpu
from runtime.engines.protocol import Engine
from runtime.errors import BusyError, EngineError, InputError
from runtime.files import check_readable
from runtime.grammar import Grammar
from runtime.memory import default_cache_bytes
from runtime.preparation import Preparation, RequestOptions
from runtime.prompts import Prompt, Prompts, Tokens
from runtime.request import Request
from runtime.sampling.noise import Noise
from runtime.scheduling.pool import Footprint
from runtime.scheduling.scheduler import Limits, Scheduler
from runtime.service import Service
from runtime.several import MOST_ANSWERS, predictions_of, prompts_of, sampling_of_answers
from runtime.token_bytes import TokenBytes
from runtime.tools import ToolFormat
from runtime.tuning import device_name, load_or_measure

MOST_BATCH = 1 << 10
MOST_QUEUE = 1 << 20
LONGEST_STALL_MS = 60_000.0
MAX_BATCH = 16
MAX_QUEUE = 1024
MAX_STALL_MS = 200.0
# New tokens of each request when warming up.
WARM_TOKENS = 4


class Generator:
    """Decoding on an exported engine, for any number of threads and tasks at once: requests share its passes, and each
    has the text that it has alone.

    Raises `EngineFileError` when the engine's files are missing, damaged or of another version, and `InputError` for
    an engine that cannot run here. `device` "cpu", "cuda" or "cuda:1" is where an ONNX engine runs, None on the CPU;
    plans run on a GPU always. `threads` is for the CPU; `InputWarning` tells of more than this process has cores. With
    `adapt` the sizes of trees are those that pay on this device and for this text. On a CPU the times of steps are
    measured the first time, which takes some seconds, and kept beside the engine; on a GPU `ht-bench tune` does so.
    Without them, or without `adapt`, sizes are the engine's own. `verify_weights=False` skips hashing the weights when
    loading (their size is always checked). With `escape_special_tokens` the text of a prompt never becomes special
    tokens, as `<|im_end|>` in a message otherwise does; each request may say it anew. `tool_format` "hermes", "llama3"
    or "mistral" is how the model writes calls of tools, None for what its template and tokens show.

    Up to `max_batch` requests run at once, and up to `max_queue` wait. Keys and values of all of them take up to
    `cache_bytes` of memory (None for a quarter of what is free, a part of which the engine may not use); on a GPU it is
    `gpu_memory_bytes` of the GPU's (None for a share of what is free once the weights are loaded: three quarters for a
    plan, half for an ONNX engine, as ONNX Runtime needs some itself). Prompts that have ended may keep
    `prefix_cache_bytes` of it (None for a quarter), for prompts that begin alike; 0 turns that off. A prompt is run in
    parts so small that requests under way wait for no more than `max_stall_ms`. Finished answers are kept in a pool of
    `text_pool_tokens` tokens, the oldest out, from which other requests are drafted; no text changes by it, but how
    fast it comes may tell that another request had the same, so that it is off (0) unless all may know that.

    As a context manager it is closed at the end. Copies made by a fork refuse to work.
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
        tool_format: str | None = None,
        max_batch: int = MAX_BATCH,
        max_queue: int = MAX_QUEUE,
        max_stall_ms: float = MAX_STALL_MS,
        cache_bytes: int | None = None,
        prefix_cache_bytes: int | None = None,
        gpu_memory_bytes: int | None = None,
        text_pool_tokens: int = 0,
    ) -> None:
        path = Path(engine)
        check_readable(path)
        if threads is not None:
            check_threads(threads)
        self._max_batch = max_batch = whole("max_batch", max_batch, 1, MOST_BATCH)
        max_queue = whole("max_queue", max_queue, 1, MOST_QUEUE)
        stall = number("max_stall_ms", max_stall_ms, 1.0, LONGEST_STALL_MS)
        sizes = {
            "cache_bytes": cache_bytes,
            "prefix_cache_bytes": prefix_cache_bytes,
            "gpu_memory_bytes": gpu_memory_bytes,
        }
        for name, given in sizes.items():
            if given is not None:
                whole(name, given)
        pool = TextPool(text_pool_tokens) if whole("text_pool_tokens", text_pool_tokens, 0, MOST_TOKENS) else None
        bundle = read_bundle(path, verify_weights=verify_weights)
        self._bundle = bundle
        self._token_bytes = TokenBytes(bundle.tokenizer)
        self.about: EngineFile = bundle.about
        with bundle.files as files:
            self.engine: Engine = self._open(files, device, threads, gpu_memory_bytes)
        memory = _memory(self.engine, self.about, cache_bytes, prefix_cache_bytes)
        self._preparation = Preparation(
            bundle,
            None,
            memory.request_rows,
            memory.option,
            escape_special_tokens=escape_special_tokens,
            tool_format=tool_format,
            text_pool=pool,
        )
        if adapt:
            name = device_name(self.engine, threads)
            on_cpu = runs_on_cpu(self.about, device)
            # Each size that is new to a GPU is set up there first; on a CPU any is as good.
            self._preparation.longest_path = LONG_PATHS[-1] if on_cpu else 0
            self._preparation.tuning = load_or_measure(
                path, self.engine, self.about, name, self.new_drafter, on_cpu=on_cpu
            )
        limits = Limits(
            max_batch, memory.rows, memory.prefix_rows, self.about.prompt_chunk, stall / 1000, memory.footprint
        )
        menus = self.tuning.batches if self.tuning else ()
        self._service = Service(Scheduler(self.engine, limits, batch_menus=menus), max_queue)
        # Also at the interpreter's end, for programs that never close it.
        self._close = weakref.finalize(self, self._service.close)

    def _open(
        self, files: EngineFiles, device: str | None, threads: int | None, gpu_memory_bytes: int | None
    ) -> Engine:
        """Return what runs the passes: another where an engine that is measured is none of a file."""
        return open_engine(files, self.about, device, threads, gpu_memory_bytes)

    def __reduce__(self) -> NoReturn:
        # What `pickle`, `copy` and process pools report of anything that they cannot handle is a TypeError.
        raise TypeError(
            "a Generator cannot be pickled or copied: it holds an engine's session and memory; make one in each "
            "process, from the engine's path"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tuning(self) -> Tuning | None:
        """What was measured of the engine on this device, None if nothing was."""
        return self._preparation.tuning

    @property
    def tool_format(self) -> ToolFormat:
        """How the model writes calls of tools: `tool_format.parse(result.text)` finds them in an answer."""
        return self._preparation.tool_format

    def tool_grammar(
        self, tools: Sequence[Tool], *, name: str | None = None, required: bool = True, parallel: bool = True
    ) -> Grammar:
        """Return the grammar of answers that call `tools`, or the one of this `name`, with arguments that fit their
        schemas; unless that is `required`, of free text in which calls are such. With `parallel` there may be several.

        Raises `InputError` for what describes no function, and for schemas that cannot be held to.
        """
        return self._preparation.tool_grammar(tools, name=name, required=required, parallel=parallel)

    @property
    def takes_tools(self) -> bool:
        """Whether the model's chat template tells it of tools; where it does not, a system message does."""
        chat = self._bundle.chat
        return chat is not None and chat.takes_tools

    def encode(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        escape_special_tokens: bool | None = None,
        tools: Sequence[Tool] | None = None,
    ) -> list[int]:
        """Return the token ids of a prompt: of chat messages, of a string as one user message, or (`raw`, or a model
        without a chat template) of the string as it is. Any number of them: the context limit is for `stream`.

        As in `transformers`, text that spells a special token becomes that token; with `escape_special_tokens` only
        the template's own does, and messages (all texts in them) and strings are encoded as text. None leaves that to
        what the generator was made with. `tools` are those of `RequestOptions`.
        """
        return self._preparation.encode(prompt, raw=raw, escape_special_tokens=escape_special_tokens, tools=tools)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, without special ones. Raises `InputError` for what is no token."""
        return tokenizer.decode(self._bundle.tokenizer, tokens)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of the text that `token` stands for within a text, a special token's name among them; they
        may be a part of a character. Raises `InputError` for what is no token.
        """
        return self._token_bytes[whole("token", token, 0, self.about.dims.vocab_size - 1)]

    @property
    def failure(self) -> EngineError | None:
        """The error that the engine has failed by, None for one that has not: after it no request is answered."""
        return self._service.scheduler.failure

    def check(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> None:
        """Raise what `submit` raises for a request that does not fit, and do nothing else."""
        self._preparation.prepare(prompt, **options)

    def submit(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Request:
        """Queue one request and return it: iterate over it for its chunks, or ask for its `result`.

        `prompt` is a string, a list of messages, or `Tokens`; `options` are those of `RequestOptions`, which are
        checked at once, and a prompt that is clearly too long is refused without reading it to its end. Raises
        `PromptTooLongError` when the prompt leaves no room within the context limit, `InputError` for anything else
        that does not fit, `BusyError` when the queue is full, `ClosedError` and `EngineError` when no more requests
        are taken. What goes wrong later is raised where chunks or the result are asked for.
        """
        service = self._service
        service.check()
        job, delivery = self._preparation.prepare(prompt, **options)
        service.submit(job)
        return Request(delivery, _canceller(service, job), len(job.state.prompt))

    # A string is a sequence of strings too, and one prompt.
    @overload
    def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> GenerationResult: ...  # type: ignore[overload-overlap]

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, *, n: int, **options: Unpack[RequestOptions]
    ) -> list[GenerationResult]: ...

    @overload
    def generate(self, prompt: Prompts, **options: Unpack[RequestOptions]) -> list[GenerationResult]: ...

    @overload
    def generate(
        self, prompt: Prompts, *, n: int, **options: Unpack[RequestOptions]
    ) -> list[list[GenerationResult]]: ...

    def generate(self, prompt: Any, *, n: int | None = None, **options: Unpack[RequestOptions]) -> Any:
        """Return the base model's answer to `prompt`, or, for a list of prompts, a list of answers in the same order.

        With `n` there are so many answers to each prompt, in a list; with a seed they have that one and the seeds after
        it, each as a request of its own has it. Arguments and errors are those of `submit`, but for `BusyError`: of
        several requests those that the queue has no room for yet wait outside. The first error ends all.
        """
        several = prompts_of(prompt)
        count = 1 if n is None else whole("n", n, 1, MOST_ANSWERS)
        self._service.check()
        sampling = options.pop("sampling", None)
        samplings = sampling_of_answers(sampling, count)
        predictions = predictions_of(options.pop("prediction", None), None if several is None else len(several))
        asked: list[tuple[Prompt, RequestOptions]] = [
            (one, {**options, "sampling": each, "prediction": prediction})
            for one, prediction in zip([prompt] if several is None else several, predictions, strict=True)
            for each in samplings
        ]
        results = self._all(asked)
        if n is not None:
            grouped = [results[start : start + count] for start in range(0, len(results), count)]
            return grouped[0] if several is None else grouped
        return results[0] if several is None else results

    def stream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Request:
        """Return the base model's answer to `prompt` as an iterator of its chunks; arguments and errors as for
        `submit`. Closing it, or dropping it, ends the request.
        """
        return self.submit(prompt, **options)

    async def agenerate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> GenerationResult:
        """Return the base model's answer to `prompt`; cancelling the task ends the request. See `submit`."""
        request = await asyncio.to_thread(self.submit, prompt, **options)
        try:
            return await request.aresult()
        finally:
            request.cancel()

    async def astream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> AsyncIterator[GenerationChunk]:
        """Yield the base model's answer to `prompt` as it comes; leaving it early ends the request. See `submit`."""
        request = await asyncio.to_thread(self.submit, prompt, **options)
        try:
            async for chunk in request:
                yield chunk
        finally:
            request.cancel()

    def new_drafter(
        self, sizing: Sizing, temperature: float = 0.0, noise: Noise | None = None, *, ngrams: bool = True
    ) -> Drafter:
        """Return what drafts one text with the engine's own statistics, greedily or for sampling at `temperature` with
        `noise`; `ngrams=False` leaves out continuations from the text itself.
        """
        return self._preparation.new_drafter(sizing, temperature, noise, ngrams=ngrams)

    def add_draft_source(self, make: Callable[[], DraftSource]) -> None:
        """Let one more source draft each text that is asked for from now on: `make` returns a new one for each, which
        the engine's thread calls between passes. It changes no text; see `runtime.drafting.source`.
        """
        self._preparation.more_sources.append(make)

    def metrics(self) -> dict[str, Any]:
        """Return counts and distributions since the beginning, and what runs and waits now, as plain data."""
        return {
            **self._service.state(),
            **self._service.scheduler.metrics.to_dict(),
            **self._preparation.grammars.counts(),
        }

    def warm_up(self) -> None:
        """Run passes of all kinds, so that no request waits for what is set up at the first ones: on a GPU those of any
        number of requests, and of all sizes that may be chosen for them, as each has a graph of its own.
        """
        for count in self._usual_counts():
            for ways in self._usual_ways(count):
                self.generate([Tokens([0])] * count, **ways)

    def _usual_counts(self) -> list[int]:
        most = min(self._max_batch, self.engine.max_slots)
        if self.engine.gpu_name is None:
            return sorted({1, most})
        return sorted({*(1 << place for place in range(most.bit_length())), most})

    def _usual_ways(self, count: int) -> list[RequestOptions]:
        some = WARM_TOKENS
        # Without drafts from the text: what repeats itself, as here, would end too soon.
        ways: list[RequestOptions] = [
            {"speculate": way, "max_new_tokens": some, "ngrams": False, "text_pool": False} for way in (False, True)
        ]
        if self.engine.gpu_name is not None and self.tuning is not None:
            menu = self.tuning.menu
            if count > 1:
                menu = next((one.menu for one in self.tuning.batches if one.requests >= count), menu)
            ways += [
                {"tree": sizes, "max_new_tokens": some, "ngrams": False, "text_pool": False}
                for sizes in menu.sizes
                if sizes.tree_rows > 1
            ]
        return ways

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait until those under way have ended, for up to `timeout` seconds; return whether
        they have.
        """
        return self._service.drain(timeout)

    def close(self) -> None:
        """End all requests, which raise `ClosedError`, and the engine's thread. Closing again does nothing."""
        self._close()

    def _all(self, asked: Sequence[tuple[Prompt, RequestOptions]]) -> list[GenerationResult]:
        requests: list[Request] = []
        try:
            for prompt, options in asked:
                requests.append(self._submit_when_possible(prompt, options, requests))
            return [request.result() for request in requests]
        finally:
            for request in requests:
                request.cancel()

    def _submit_when_possible(self, prompt: Prompt, options: RequestOptions, before: Sequence[Request]) -> Request:
        while True:
            try:
                return self.submit(prompt, **options)
            except BusyError:
                unfinished = next((request for request in before if not request.done), None)
                if unfinished is None:
                    # The queue is full of others' requests.
                    raise
                with contextlib.suppress(TimeoutError):
                    unfinished.result(0.1)


def _canceller(service: Service, job: Any) -> Callable[[], None]:
    return lambda: service.cancel(job)


@dataclass(frozen=True)
class _Memory:
    """Rows of keys and values: of all requests and kept prefixes, of the latter alone, and of one request at most; the
    `option` that allows them, and what slots take where all of them have the same room.
    """

    rows: int
    prefix_rows: int
    request_rows: int
    option: str
    footprint: Footprint | None = None


def _memory(engine: Engine, about: EngineFile, cache_bytes: int | None, prefix_bytes: int | None) -> _Memory:
    """Return the rows that there is memory for. Raises `InputError` where they are too few for anything."""
    row = engine.row_bytes
    on_gpu = engine if isinstance(engine, DeviceEngine) else None
    if on_gpu is None:
        option = "cache_bytes"
        given = default_cache_bytes(row * about.max_context) if cache_bytes is None else cache_bytes
        rows = most = given // row
    elif cache_bytes is not None:
        raise InputError("cache_bytes is for engines on the CPU; on a GPU give gpu_memory_bytes in its place")
    else:
        option = "gpu_memory_bytes"
        rows, most = on_gpu.budget.rows, on_gpu.budget.slot_rows
        given = rows * row
    least = about.tree.tree_rows * (1 + about.dims.num_steps) + 2
    if most < least:
        raise InputError(
            f"{option} is {given}, and this engine needs {least * row} for the shortest request ({row} for each "
            "token); give more"
        )
    prefix_rows = rows // 4 if prefix_bytes is None else min(prefix_bytes // row, rows)
    if on_gpu is None:
        return _Memory(rows, prefix_rows, most, option)
    return _Memory(rows, prefix_rows, on_gpu.request_rows, option, on_gpu.budget.footprint)
