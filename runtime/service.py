"""The thread that runs an engine, and the queue in front of it: many callers, one engine."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from runtime.errors import BusyError, ClosedError, EngineError, InputError, ServiceError, one_line
from runtime.scheduling.job import Job
from runtime.scheduling.scheduler import Scheduler

LOG = logging.getLogger(__name__)
# Seconds that closing waits for the step that is under way.
LONGEST_STEP = 60.0
T = TypeVar("T")


class Service:
    """Runs the jobs that are submitted, from any thread, in a thread of its own: that of `scheduler`, which nobody else
    uses. At most `max_queue` jobs wait for their turn.

    The thread begins with the first job. It ends with `close`, at the interpreter's end at the latest.
    """

    def __init__(self, scheduler: Scheduler, max_queue: int) -> None:
        self.scheduler = scheduler
        self.max_queue = max_queue
        self._process = os.getpid()
        self._changed = threading.Condition()
        # Work for the thread, in order.
        self._inbox: deque[Callable[[], None]] = deque()
        # Jobs that were submitted and are not with the scheduler yet.
        self._incoming = 0
        self._thread: threading.Thread | None = None
        self._refusal: str | None = None
        self._ends = False

    def check(self) -> None:
        """Raise `ServiceError` in another process than the one that this was made in, `ClosedError` when it is closed,
        and `InputError` in the engine's own thread, which cannot wait for itself.
        """
        self._check_caller()
        self._check_open()

    def _check_caller(self) -> None:
        if os.getpid() != self._process:
            raise ServiceError(
                "this generator was made before a fork, and its engine's threads are in the process that made it; make "
                "one in each process, after the fork, or start processes with the spawn method"
            )
        if threading.current_thread() is self._thread:
            raise InputError("a processor cannot call the generator that calls it; load another one for that")

    def submit(self, job: Job) -> None:
        """Queue `job`. Raises `BusyError` when as many wait as may, `EngineError` when the engine has failed, and what
        `check` raises.
        """
        self.check()
        if self.scheduler.failure is not None:
            raise self.scheduler.failure
        with self._changed:
            self._check_open()
            waiting = len(self.scheduler.waiting) + self._incoming
            if waiting >= self.max_queue:
                raise BusyError(waiting, len(self.scheduler.running), self.max_queue)
            self._incoming += 1
            self._post(lambda: self._take(job))

    def cancel(self, job: Job) -> None:
        """Drop `job` within one step. It may be called from anywhere, at any time."""
        if os.getpid() == self._process and not self._ends:
            # Without a lock: it may be called by the garbage collector, wherever it is.
            self._inbox.append(lambda: self.scheduler.cancel(job))
            if threading.current_thread() is not self._thread and self._changed.acquire(blocking=False):
                try:
                    self._changed.notify_all()
                finally:
                    self._changed.release()

    def call(self, work: Callable[[], T]) -> T:
        """Do `work` in the engine's thread, between two steps; return what it returns, or raise what it raises."""
        self.check()
        done = threading.Event()
        found: list[T] = []
        errors: list[BaseException] = []

        def do() -> None:
            try:
                if self._ends:
                    raise ClosedError("the generator was closed")
                found.append(work())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        with self._changed:
            self._check_open()
            self._post(do)
        done.wait()
        if errors:
            raise errors[0]
        return found[0]

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more jobs, and wait until those that there are have ended, for up to `timeout` seconds; return
        whether they have. It may be called again, to wait longer.
        """
        self._check_caller()
        with self._changed:
            if self._ends:
                raise ClosedError(self._refusal or "the generator is closed")
            self._refusal = self._refusal or "the generator is being drained and takes no more requests"
            return self._changed.wait_for(lambda: self._empty, timeout)

    def close(self) -> None:
        """End all jobs, with `ClosedError`, and the thread. Nothing happens when that was done before."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._refusal = "the generator is closed"
            self._ends = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(LONGEST_STEP)

    def state(self) -> dict[str, Any]:
        """Return how many jobs run and wait, and the rows of the cache that are in use, as plain data."""
        scheduler = self.scheduler
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting) + self._incoming,
            "max_queue": self.max_queue,
            "cache_rows": scheduler.slots.pool.rows,
            "reserved_rows": scheduler.slots.pool.reserved,
            "most_reserved_rows": scheduler.slots.pool.most_reserved,
            "kept_prefixes": len(scheduler.slots.prefixes),
        }

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise ClosedError(self._refusal)

    # What follows is for the holder of the lock, or for the thread.

    @property
    def _empty(self) -> bool:
        return not self._inbox and not self._incoming and self.scheduler.idle

    def _post(self, work: Callable[[], None]) -> None:
        self._inbox.append(work)
        if self._thread is None:
            # A program that forgets to close it ends all the same.
            self._thread = threading.Thread(target=self._run, name="hidden-transfer engine", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _take(self, job: Job) -> None:
        with self._changed:
            self._incoming -= 1
        try:
            self.scheduler.add(job)
        except ServiceError as error:
            job.listener.failed(job, error)

    def _run(self) -> None:
        try:
            while self._next():
                self.scheduler.step()
        except EngineError as error:
            self.scheduler.fail(error)
        except BaseException as error:
            # A fault of ours: nobody may wait for ever.
            LOG.exception("the engine's thread has failed")
            self.scheduler.fail(EngineError(f"the scheduler failed ({type(error).__name__}: {one_line(error)})"))
        finally:
            self._end()

    def _next(self) -> bool:
        """Do what is in the inbox, waiting for something to do; return False at the end."""
        while self._inbox:
            self._inbox.popleft()()
        if not self.scheduler.idle:
            return not self._ends
        with self._changed:
            self._changed.notify_all()
            while not self._inbox and not self._ends:
                # Not for ever: a cancellation may have come without the lock.
                self._changed.wait(1.0)
        return not self._ends

    def _end(self) -> None:
        closed = ClosedError("the generator was closed")
        with self._changed:
            self._ends = True
            self._refusal = self._refusal or "the generator is closed"
        while self._inbox:
            self._inbox.popleft()()
        self.scheduler.close(closed)
        with self._changed:
            self._changed.notify_all()
