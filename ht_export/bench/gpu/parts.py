"""The parts of `ht-bench gpu`: each runs in a process of its own, so that one that crashes or hangs leaves the others.

A part is a generator of (section, value) pairs. A kernel that reads where it must not breaks CUDA for its whole
process, a library may end the process, and the libraries of two engines need not get along.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from runtime.errors import InputError

Sections = Iterator[tuple[str, Any]]
Part = Callable[..., Sections]


def isolated(part: Part, *arguments: Any, seconds: float) -> Sections:
    """Yield the sections of a part as they come; an "error" where it failed, crashed, or took more than `seconds`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, part, arguments))
    process.start()
    # The child's end alone is left, so that its death is seen here.
    sender.close()
    end = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            try:
                yield receiver.recv()
            except EOFError:
                process.join()
                if process.exitcode:
                    yield "error", f"its process ended with status {process.exitcode}"
                return
        yield "error", f"stopped after {seconds:.0f} s; allow more with --limit"
    finally:
        process.kill()
        process.join()


def guarded(part: Part, *arguments: Any) -> Sections:
    """Yield the sections of a part, in this process, and an "error" where it failed."""
    try:
        yield from part(*arguments)
    except Exception as error:
        yield "error", explain(error)


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `work` does, or the "error" that kept it from it."""
    try:
        return work()
    except Exception as error:
        return {"error": explain(error)}


def explain(error: Exception) -> str:
    """Return an error as one line; where it is no user's mistake, its traceback goes to stderr."""
    if isinstance(error, InputError):
        return str(error)
    traceback.print_exception(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def note(text: str) -> None:
    """Say on stderr what is going on."""
    print(f"ht-bench gpu: {text}", file=sys.stderr, flush=True)


def finite(value: Any) -> float | None:
    """Return a number for JSON, which has none that is infinite or not a number: None in their place."""
    number = float(value)
    return number if math.isfinite(number) else None


def _send(sender: Connection, part: Part, arguments: tuple[Any, ...]) -> None:
    try:
        for section in guarded(part, *arguments):
            sender.send(section)
    except KeyboardInterrupt:
        # Ctrl-C reaches every process; the parent says so.
        sys.exit(130)
