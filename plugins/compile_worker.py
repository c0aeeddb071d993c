"""The process that compiles kernels for `plugins.compile_pool`: Triton's compiler is for one thread, and may crash."""

from __future__ import annotations

import os
import sys

import msgspec

from plugins.binaries import Kernel
from plugins.specialisations import Specialisation


class Answer(msgspec.Struct):
    """What became of one kernel: itself, or the compiler's error."""

    kernel: Kernel | None = None
    error: str | None = None


def main() -> None:
    """Answer each line of stdin, a `Specialisation`, with a line, an `Answer`, until there are no more."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # The compiler prints what it could not assemble.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Behind the above: importing it may print, too.
    from plugins.compile import compile_one

    for line in sys.stdin.buffer:
        wanted = msgspec.json.decode(line, type=Specialisation)
        try:
            answer = Answer(kernel=compile_one(wanted))
        except Exception as error:
            answer = Answer(error=f"{type(error).__name__}: {error}")
        answers.write(msgspec.json.encode(answer) + b"\n")
        answers.flush()
