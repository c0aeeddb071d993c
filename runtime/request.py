"""`Request`: one answer under way, for whoever asked for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from runtime.answer import Answer, GenerationChunk, GenerationResult
from runtime.errors import CancelledError

if TYPE_CHECKING:
    from runtime.scheduling.job import Job


class Delivery:
    """What an engine's thread hands over to those who wait for an answer: its chunks, and how it ended.

    It knows nothing of the `Request`: with that dropped, the answer ends. `keep` is given the tokens of an answer that
    has come to its own end, in the engine's thread, before anybody is told of it.
    """

    def __init__(self, answer: Answer, keep: Callable[[Sequence[int]], None] | None = None) -> None:
        self._answer = answer
        self._keep = keep
        self._changed = threading.Condition()
        self._chunks: deque[GenerationChunk] = deque()
        self._result: GenerationResult | None = None
        self._error: BaseException | None = None
        self._watchers: list[Callable[[], None]] = []

    # In the engine's thread.

    def stepped(self, job: Job) -> None:
        """See `runtime.scheduling.job.Listener`."""
        chunk = self._answer.step(job.state, job.cached)
        if self._keep is not None and chunk.result is not None and chunk.result.finish_reason != "deadline":
            self._keep(chunk.result.tokens)
        with self._changed:
            self._chunks.append(chunk)
            self._result = chunk.result
            self._tell()

    def failed(self, job: Job, error: BaseException) -> None:
        """See `runtime.scheduling.job.Listener`."""
        self.end(error)

    def end(self, error: BaseException) -> None:
        """End by `error`, unless it has ended."""
        with self._changed:
            if not self.done:
                self._error = error
                self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for watcher in self._watchers:
            watcher()

    # In any thread.

    @property
    def done(self) -> bool:
        """Return whether it has ended."""
        return self._result is not None or self._error is not None

    @property
    def ready(self) -> bool:
        """Return whether `take` has something to return or to raise."""
        return bool(self._chunks) or self.done

    @contextlib.contextmanager
    def watched(self, watcher: Callable[[], None]) -> Iterator[None]:
        """Have `watcher`, which raises nothing, called at every change in the block."""
        with self._changed:
            self._watchers.append(watcher)
        try:
            yield
        finally:
            with self._changed:
                self._watchers.remove(watcher)

    def take(self) -> GenerationChunk | None:
        """Wait for the next chunk and return it, None after the last one. Raises the error that the answer has ended
        by, after the chunks that came before it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.ready)
            if self._chunks:
                return self._chunks.popleft()
            if self._error is not None:
                raise self._error
            return None

    async def until(self, ready: Callable[[], bool]) -> None:
        """Wait, as a task, until `ready`."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def tell() -> None:
            # A loop that was closed has nobody who waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        with self.watched(tell):
            while not ready():
                await changed.wait()
                changed.clear()

    def wait_for_result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the end. Raises the error that it came by, and `TimeoutError` after so many seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"no result after {timeout} s; the request goes on, cancel it if that is too long")
            if self._error is not None:
                raise self._error
            assert self._result is not None
            return self._result


class Request:
    """One answer under way: iterate over its chunks as they come, with `for` or `async for`, or wait for its `result`.

    It ends early by `cancel`, and when nothing refers to it any more. Its prompt has `prompt_tokens` tokens.
    """

    def __init__(self, delivery: Delivery, cancel: Callable[[], None], prompt_tokens: int = 0) -> None:
        self._delivery = delivery
        self.prompt_tokens = prompt_tokens
        self._cancel = weakref.finalize(self, cancel)
        # At the interpreter's end all requests end.
        self._cancel.atexit = False

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Request cannot be pickled or copied: it is one answer under way, in this process")

    def __iter__(self) -> Iterator[GenerationChunk]:
        return self

    def __next__(self) -> GenerationChunk:
        chunk = self._delivery.take()
        if chunk is None:
            raise StopIteration
        return chunk

    def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        return self

    async def __anext__(self) -> GenerationChunk:
        delivery = self._delivery
        await delivery.until(lambda: delivery.ready)
        chunk = delivery.take()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    @property
    def done(self) -> bool:
        """Return whether it has ended: with its result, by an error, or cancelled."""
        return self._delivery.done

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the whole answer and return it.

        Raises the error that ended the request, `CancelledError` if it was cancelled, and `TimeoutError` when there is
        no answer after `timeout` seconds: the request goes on.
        """
        return self._delivery.wait_for_result(timeout)

    async def aresult(self) -> GenerationResult:
        """Wait for the whole answer, as a task; see `result`. A task that is cancelled does not cancel the request."""
        delivery = self._delivery
        await delivery.until(lambda: delivery.done)
        return delivery.wait_for_result()

    def cancel(self) -> None:
        """End the request within one step, if it has not ended; whoever waits for it gets `CancelledError`."""
        self._delivery.end(CancelledError("the request was cancelled"))
        self._cancel()

    def close(self) -> None:
        """Cancel the request: a stream that is left early is closed."""
        self.cancel()
