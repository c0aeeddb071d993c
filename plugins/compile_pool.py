"""Kernels compiled in processes beside this one, as many at a time as there are cores."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from plugins.binaries import Kernel
from plugins.compile_worker import Answer
from plugins.specialisations import Specialisation

# More than there are kernels of one architecture gain little, and each takes memory.
MOST_WORKERS = 16
# Bytes that a process takes: 200 MiB with the largest kernels, and something to spare.
WORKER_MEMORY = 384 << 20
# Characters of an error that come from the compiler, which may say a page.
MOST_SAID = 500

# Told how many kernels are compiled, and how many there are.
Report = Callable[[int, int], None]


class CompilationError(RuntimeError):
    """A kernel could not be compiled: the message says which, and what the compiler said."""


def compile_all(
    wanted: Iterable[Specialisation], workers: int, report: Report = lambda done, total: None
) -> dict[Specialisation, Kernel]:
    """Compile `wanted` in up to `workers` processes, which end with this call, however it ends.

    Each kernel is the same however many processes there are. Triton keeps what is compiled in its cache
    (`TRITON_CACHE_DIR`), whole or not at all. Raises `CompilationError`.
    """
    waiting = deque(_in_order(wanted))
    total = sum(map(len, waiting))
    compiled: dict[Specialisation, Kernel] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ht-kernels-")))
        selector = stack.enter_context(selectors.DefaultSelector())
        report(0, total)
        for index in range(min(max(1, workers), MOST_WORKERS, len(waiting))):
            worker = _Worker(folder / str(index))
            stack.callback(worker.end)
            worker.ask(waiting.popleft())
            selector.register(worker.answers, selectors.EVENT_READ, worker)
        while len(compiled) < total:
            for key, _ in selector.select():
                worker = key.data
                one, kernel = worker.answer()
                compiled[one] = kernel
                report(len(compiled), total)
                if worker.left or waiting:
                    worker.ask(worker.left or waiting.popleft())
                else:
                    selector.unregister(worker.answers)
    return compiled


def _in_order(wanted: Iterable[Specialisation]) -> list[list[Specialisation]]:
    """Return the kernels, those of the same code together: the first makes it, and the others find it in the cache.

    The longest come first, so that none of them is left for the end: attention by its rows, then all others.
    """
    groups: dict[Specialisation, list[Specialisation]] = {}
    for one in dict.fromkeys(wanted):
        groups.setdefault(one.code, []).append(one)
    return sorted(groups.values(), key=lambda group: -group[0].variant.block_m if not group[0].vocab_size else 0)


class _Worker:
    """One process of `plugins.compile_worker`, with a folder for its temporary files and what it says."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._log = folder / "log"
        # Not from where the user is (-P): there may be another package of that name.
        root = str(Path(__file__).resolve().parents[1])
        path = f"sys.path[:0] = [] if {root!r} in sys.path else [{root!r}]"
        code = f"import sys; {path}; from plugins.compile_worker import main; main()"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # What the compiler leaves behind when it is ended goes with the folder.
                env={**os.environ, "TMPDIR": str(folder)},
                # Ctrl-C is for this process, which ends the other one, and the assembler that it may be running.
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions = self._process.stdin
        self.answers = self._process.stdout
        self.left: list[Specialisation] = []
        self._asked: Specialisation | None = None

    def ask(self, group: Sequence[Specialisation]) -> None:
        """Let it compile the first of these kernels, the others are `left`; `answer` comes next."""
        self._asked, *self.left = group
        # Of a process that has ended `answer` tells.
        with contextlib.suppress(BrokenPipeError):
            self._questions.write(msgspec.json.encode(self._asked) + b"\n")
            self._questions.flush()

    def answer(self) -> tuple[Specialisation, Kernel]:
        """Return what was asked for, and the kernel. Raises `CompilationError`."""
        asked = self._asked
        assert asked is not None
        line = self.answers.readline()
        # Of one that dies the line may be cut.
        if not line.endswith(b"\n"):
            raise CompilationError(f"{asked}: {_cause(self._process.wait())}{self._said()}")
        answer = msgspec.json.decode(line, type=Answer)
        self._asked = None
        if answer.kernel is None:
            raise CompilationError(f"{asked}: {' '.join(str(answer.error).split())[:MOST_SAID]}")
        return asked, answer.kernel

    def end(self) -> None:
        """End it, whatever it does, and leave nothing unfinished of it in Triton's cache."""
        with contextlib.suppress(OSError):
            self._questions.close()
        if self._asked is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        # One that has answered ends by itself, as there are no more questions.
        self._process.wait()
        self.answers.close()
        if self._asked is not None:
            for left in _cache().glob(f"*/tmp.pid_{self._process.pid}_*"):
                shutil.rmtree(left, ignore_errors=True)

    def _said(self) -> str:
        tail = " ".join(self._log.read_text(encoding="utf-8", errors="replace").split())[-MOST_SAID:]
        return f" ({tail})" if tail else ""


def _cache() -> Path:
    """Return Triton's cache, as it finds it."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def _cause(status: int) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"the compiler was killed with {name}" + (", likely for want of memory" if name == "SIGKILL" else "")
    return f"the compiler ended with status {status}"
