"""The process of a peer, from this side: started, asked with a time limit, and ended; whatever it does is one error."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from runtime.errors import one_line

START = Path(__file__).with_name("start.py")
# This package's folder, for workers that run in this Python.
ROOT = Path(__file__).resolve().parents[3]
# Bytes of an answer: far more than all tokens of all prompts have.
MOST_BYTES = 1 << 24
# Bytes of what a process has written on stderr last.
LAST_WORDS = 1 << 12
START_SECONDS = 120.0


class PeerError(Exception):
    """A peer did not do what it was asked: `cause` says why, in one line."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class MissingError(PeerError):
    """What a peer needs is not installed."""


def command_of(worker: str, python: str) -> list[str]:
    """Return how the worker of this name is started."""
    return [python, "-u", str(START), worker]


def environment_of(threads: int, *, own: bool) -> dict[str, str]:
    """Return the environment of a worker: a peer finds what is in its own Python, and asks no hub for anything."""
    found = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if own:
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    else:
        found.pop("PYTHONPATH", None)
    return found


class Worker:
    """A process of `start.py`, as a context manager: it is started at the beginning and ended at the end.

    `begun` is when it was started, as `time.perf_counter` tells. Raises `PeerError` for one that cannot be started, and
    `MissingError` for one that lacks what it needs.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], seconds: float = START_SECONDS) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.begun = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                env=dict(environment),
                # A group of its own, with whatever it starts; Ctrl-C is for this process, which ends it.
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise PeerError(f"cannot start {command[0]} ({error.strerror or error})") from error
        self._held = bytearray()
        try:
            hello = self._read(seconds)
            if not isinstance(hello.get("ready"), bool):
                raise PeerError("it wrote something else than what a worker says first")
            if not hello["ready"]:
                raise MissingError(f"{command[0]} has no {', '.join(map(str, hello.get('missing', ())))}")
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def ask(self, do: str, seconds: float, **asked: Any) -> dict[str, Any]:
        """Return the answer to a request. Raises `PeerError` where there is none within so many seconds."""
        try:
            self._write(json.dumps({"do": do, **asked}).encode() + b"\n", seconds)
        except OSError:
            raise PeerError(self._ended()) from None
        found = self._read(seconds)
        if isinstance(told := found.get("error"), str):
            raise PeerError(one_line(told))
        if not isinstance(answer := found.get("ok"), dict):
            raise PeerError("it wrote something else than an answer")
        return answer

    def end(self) -> None:
        """End the process and what it started; nothing is left of it."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._process.wait()
        self._errors.close()

    def _write(self, content: bytes, seconds: float) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        # One that does not read must not hold this process up.
        os.set_blocking(pipe.fileno(), False)
        end, left = time.monotonic() + seconds, memoryview(content)
        with selectors.DefaultSelector() as ready:
            ready.register(pipe, selectors.EVENT_WRITE)
            while left:
                if not ready.select(end - time.monotonic()):
                    raise PeerError(f"it took no request within {seconds:g} s and was ended")
                left = left[pipe.write(left) or 0 :]

    def _read(self, seconds: float) -> dict[str, Any]:
        pipe = self._process.stdout
        assert pipe is not None
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as ready:
            ready.register(pipe, selectors.EVENT_READ)
            searched = 0
            while (found_at := self._held.find(b"\n", searched)) < 0:
                searched = len(self._held)
                if searched > MOST_BYTES:
                    raise PeerError(f"it wrote more than {MOST_BYTES >> 20} MiB without an end")
                if not ready.select(max(0.0, end - time.monotonic())):
                    raise PeerError(f"it did not answer within {seconds:g} s and was ended")
                part = pipe.read(1 << 16)
                if not part:
                    raise PeerError(self._ended())
                self._held += part
        line = bytes(self._held[:found_at])
        del self._held[: found_at + 1]
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise PeerError(f"it wrote what is no answer: {one_line(line.decode(errors='replace'), 60)!r}")
        return found

    def _ended(self) -> str:
        """Return how it ended, with its last words."""
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its stdout"
        how = f"signal {-status}" if status < 0 else f"status {status}"
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - LAST_WORDS))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with {how}" + (f": {one_line(lines[-1])}" if lines else "")
