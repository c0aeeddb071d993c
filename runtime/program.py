"""Shared by all command lines: a user's mistake is one line on stderr, never a traceback.

A program does all that it does within `run`, the reading of its options and the imports of large libraries too.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from runtime.errors import InputError, InputWarning, ServiceError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Told how many steps of a long work are done, and how many there are.
Advance = Callable[[int, int], None]


def run(program: str, work: Callable[[], int | None], *, interrupted: str | Callable[[], str]) -> int:
    """Do `work` and return the exit status.

    It is what `work` returns, 0 for None; 1 for an `InputError` or `OSError`, also where stdout cannot be written; 130,
    with the line `interrupted`, for Ctrl-C and when asked to terminate. When the reader of stdout goes away the work
    ends quietly; what stderr does not take is lost, and the work goes on. `SystemExit` of argparse is passed on.
    """
    with _usable_streams(), _warnings_in_one_line(program), _Signals() as signals:
        try:
            return _finished(work)
        except SystemExit:
            raise
        except BrokenPipeError:
            return 0
        except BaseException as error:
            # A library that is interrupted while it is imported may raise an error of its own.
            if signals.came or isinstance(error, KeyboardInterrupt):
                line, status = interrupted if isinstance(interrupted, str) else interrupted(), 130
            elif isinstance(error, Exception) and (told := _told(error)):
                line, status = f"error: {told}", 1
            else:
                raise
            print(f"{program}: {_in_one_line(line)}", file=sys.stderr)
            return status
        finally:
            _let_go_of_stdout()


def say(text: str) -> None:
    """Print `text` on stdout. Where its reader has gone away it is lost, and the work goes on to its exit status."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _discard_stdout()


def _finished(work: Callable[[], int | None]) -> int:
    """Do `work` to the end, which is where its output is written; return the exit status."""
    try:
        status = work() or 0
    except SystemExit as end:
        if not end.code:
            # Help that nobody could read is not a success.
            sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


def _told(error: Exception) -> str | None:
    """Return what to tell of an error that is the user's or the machine's, None for a fault of ours."""
    if isinstance(error, (InputError, ServiceError)):
        return str(error)
    if isinstance(error, MemoryError):
        return f"not enough memory ({error})"
    if isinstance(error, OSError):
        if error.errno == errno.EBADF and error.filename is None and sys.__stdout__ is None:
            return "stdout is closed; give it a place to write to"
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    return None


def _in_one_line(text: str) -> str:
    """Return `text` with escapes for what would do something to a terminal: it may quote a name, or a file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Messages(io.FileIO):
    """What the file descriptor of stderr takes of what is written; the rest is lost without an error."""

    def write(self, data: ReadableBuffer) -> int:
        """See `io.FileIO`."""
        with contextlib.suppress(OSError):
            super().write(data)
        return memoryview(data).nbytes


@contextlib.contextmanager
def _usable_streams() -> Iterator[None]:
    """Let stdout and stderr be there, whatever the program was started with."""
    # A file that is opened later must not become stdout or stderr, where libraries write their own messages to. Reading
    # from such a stdin and writing to such a stdout fail.
    for descriptor, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)
    before = sys.stdout, sys.stderr
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A terminal that lacks a character shows another in its place.
        sys.stdout.reconfigure(errors="replace")
    if sys.stderr is sys.__stderr__:
        encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
        raw = io.BufferedWriter(_Messages(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _let_go_of_stdout() -> None:
    """Write what is left for stdout, or drop it: at its end the interpreter would complain."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _discard_stdout()


def _discard_stdout() -> None:
    """Let all that is still written to stdout vanish."""
    # A stream without a file descriptor of its own, as in tests, complains about nothing.
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _Signals:
    """SIGINT, and SIGTERM as service managers send it, raise one `KeyboardInterrupt`; `came` tells that one did.

    Another one changes nothing while the first is cleaned up after; one more ends the process without that.
    """

    def __init__(self) -> None:
        self.came = False
        self._ignored = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        """Begin to listen, where that is possible and the signal is not ignored, as in the background of a shell."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        """Listen as before; after a signal what is left, the interpreter's end, may be cut short by another one."""
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if self.came else before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if not _is_interrupted():
            raise KeyboardInterrupt
        self._ignored += 1
        if self._ignored > 1:
            os._exit(130)


def _is_interrupted() -> bool:
    """Return whether a `KeyboardInterrupt` is being handled, so in an `except` or `finally` that it came to."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


@contextlib.contextmanager
def _warnings_in_one_line(program: str) -> Iterator[None]:
    """Show an `InputWarning` as errors are shown, and other warnings as ever."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, InputWarning):
            print(f"{program}: warning: {_in_one_line(str(message))}", file=sys.stderr)
        else:
            before(message, category, *place, **more)

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument that names a base model."""
    parser.add_argument("model", help="known name (smollm2-135m), Hugging Face folder, .gguf file, or hub id")


def add_adapter(parser: argparse._ActionsContainer) -> None:
    """Add the option that names adapters of a base model."""
    parser.add_argument(
        "--adapter",
        type=pathname,
        action="append",
        default=[],
        dest="adapters",
        metavar="FOLDER",
        help="LoRA adapter to merge into the model, a folder that PEFT has saved; repeat for more, merged in turn",
    )


def integers(text: str) -> tuple[int, ...]:
    """Parse a list of integers such as 20,20,20; the type of an option with one number for each draft step."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 4,4,2") from None


def pathname(text: str) -> Path:
    """Parse the name of a file or folder; the type of every option that is one."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a file or folder is empty; give one")
    return Path(text)
