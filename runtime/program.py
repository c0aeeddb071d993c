"""Shared by all command lines: a user's mistake is one line on stderr, never a traceback."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from runtime.errors import InputError

# Told how many steps of a long work are done, and how many there are.
Advance = Callable[[int, int], None]


def run(program: str, work: Callable[[], None], *, interrupted: str) -> int:
    """Do `work` and return the exit status.

    0; 1 for an `InputError` or `OSError`; 130, with the line `interrupted`, for Ctrl-C and when asked to terminate.
    """
    try:
        with _terminated_like_interrupted():
            work()
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"{program}: error: not enough memory ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: {interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away: nothing is left to say, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        # A file that cannot be read, say.
        print(f"{program}: error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM, as service managers send it, clean up as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument that names a base model."""
    parser.add_argument("model", help="known name (smollm2-135m), Hugging Face folder, .gguf file, or hub id")


def integers(text: str) -> tuple[int, ...]:
    """Parse a list of integers such as 20,20,20; the type of an option with one number for each draft step."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 4,4,2") from None
