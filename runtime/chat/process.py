"""A process beside this one that renders a chat template: started, asked with a time limit, and ended."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING

from runtime.errors import InputError

if TYPE_CHECKING:
    import subprocess

# Seconds until a process must be ready: none of them are the template's.
START_SECONDS = 60.0
# Bytes of the longest answer: 2**24 characters of text, and what belongs to it.
MOST_BYTES = (4 << 24) + 1024
# Variables of the environment that a process may need; none of those with keys and passwords.
ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")


class ProcessEndedError(Exception):
    """The process has ended, or was ended, before it answered: `expired` when its time was over."""

    def __init__(self, status: int, *, expired: bool) -> None:
        super().__init__(status, expired)
        self.expired = expired
        self.cause = f"its process ended with {f'signal {-status}' if status < 0 else f'status {status}'}"


class TemplateProcess:
    """One process of `runtime.chat.worker`, for one thread at a time.

    It is starting when this returns. It ends with this object, with this process, and with `end`. Raises `InputError`
    when no process can be started.
    """

    def __init__(self) -> None:
        # Not imported before an engine is loaded: importing the runtime stays light.
        import subprocess
        from multiprocessing import spawn

        # Programs that embed Python say there which program Python is.
        executable = os.fsdecode(spawn.get_executable() or b"")
        code = f"import sys; sys.path += {_places()!r}; import worker; worker.main()"
        try:
            self._process = subprocess.Popen(
                # Isolated: no module but the standard library's and those in the places named, and no file written.
                [executable, "-I", "-S", "-B", "-c", code],
                # Without buffers, which a fork in the middle of a request would copy.
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
                # Ctrl-C is for this process, which ends the other one.
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(f"{_cannot_start(executable)} ({error.strerror or error})") from error
        self._executable = executable
        self._ready = False
        self.end = weakref.finalize(self, _end, self._process, os.getpid())

    @property
    def alive(self) -> bool:
        """Return whether the process can be asked."""
        return self.end.alive and self._process.poll() is None

    def ask(self, request: bytes, seconds: float) -> bytes:
        """Return the answer to `request`. Raises `ProcessEndedError` when there is none after so many seconds."""
        if not self._ready:
            try:
                self._exchange(b"", START_SECONDS)
            except ProcessEndedError as error:
                raise InputError(f"{_cannot_start(self._executable)} ({error.cause})") from error
            self._ready = True
        return self._exchange(request, seconds)

    def _exchange(self, request: bytes, seconds: float) -> bytes:
        # Nothing of the timer keeps this object, at whose end the process ends.
        process, waiting, expired, lock = self._process, True, False, threading.Lock()

        def expire() -> None:
            nonlocal expired
            with lock:
                if waiting:
                    expired = True
                    process.kill()

        # Ended by another thread, whatever this one waits for: to write or to read.
        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            if request:
                _write(process.stdin, len(request).to_bytes(4, "big") + request)
            size = int.from_bytes(_read(process.stdout, 4), "big")
            if not 1 <= size <= MOST_BYTES:
                raise EOFError
            return _read(process.stdout, size)
        except (OSError, EOFError):
            self.end()
            raise ProcessEndedError(process.returncode, expired=expired) from None
        except BaseException:
            # Interrupted: its answer would be taken for that to the next request.
            self.end()
            raise
        finally:
            timer.cancel()
            with lock:
                waiting = False


def _places() -> list[str]:
    """Return where the process finds its modules: the worker's folder, and those that have Jinja."""
    places = [str(Path(__file__).parent)]
    for name in ("jinja2", "markupsafe"):
        spec = find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"{name} is not installed, which chat templates need; install hidden-transfer again")
        places.append(str(Path(spec.submodule_search_locations[0]).absolute().parent))
    return places


def _cannot_start(executable: str) -> str:
    return (
        f"cannot start {executable or 'Python'} to render chat templates; a program that embeds Python names its "
        "interpreter with multiprocessing.set_executable"
    )


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End `process`, which the process `owner` started, and leave nothing of it: no zombie, no open pipe."""
    if os.getpid() == owner:
        process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
    if os.getpid() == owner:
        process.wait()
    else:
        # A copy of the object, made by a fork: the process is not this one's child, and goes on.
        process.returncode = 0


def _write(pipe: IO[bytes] | None, content: bytes) -> None:
    assert pipe is not None
    left = memoryview(content)
    while left:
        left = left[pipe.write(left) :]


def _read(pipe: IO[bytes] | None, size: int) -> bytes:
    assert pipe is not None
    found = bytearray()
    while len(found) < size:
        part = pipe.read(min(size - len(found), 1 << 20))
        if not part:
            raise EOFError
        found += part
    return bytes(found)
