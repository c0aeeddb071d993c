"""Progress on the terminal: a bar for counted work, a ticking line for work that cannot be counted; lines in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn

# Entered around each stage with its description; gives what tells how far the stage is.
Stage = Callable[[str], AbstractContextManager[Callable[[str], None]]]

# Between lines in a log, in seconds.
LOG_EVERY = 30

# The display that all bars and stages are part of, where there is one.
_shared: ContextVar[Progress | None] = ContextVar("shared", default=None)


class _LoggedProgress(Progress):
    """Prints a line now and then where there is no terminal to draw bars on."""

    _last = 0.0

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """See `Progress.update`."""
        super().update(task_id, **changes)
        self._log(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """See `Progress.advance`."""
        super().advance(task_id, advance)
        self._log(task_id)

    def _log(self, task_id: TaskID) -> None:
        now = time.monotonic()
        if self.disable or self.console.is_terminal or now - self._last < LOG_EVERY:
            return
        self._last = now
        task = next(task for task in self.tasks if task.id == task_id)
        self.console.print(*(column(task) for column in self.columns if not isinstance(column, BarColumn | str)))


def progress_bar(*, disable: bool = False, auto_refresh: bool = True) -> AbstractContextManager[Progress]:
    """Return a bar with count, elapsed and remaining time, drawn on stderr unless disabled; in a log it is a line now
    and then. Within `one_display` it is a part of that.

    Without `auto_refresh` it is drawn when it is told to, and takes no time beside what is timed.
    """
    shared = _shared.get()
    if shared is not None and not disable:
        return _part_of(shared)
    return _new_bar(disable, auto_refresh)


class Whole:
    """One display of several stages, under a bar that counts them."""

    def __init__(self, display: Progress, description: str, stages: int) -> None:
        self._display = display
        self._task = display.add_task(description, total=stages)
        self._begun = 0

    def begin(self, line: str) -> None:
        """Count the stages before this one as done, and print `line` for it."""
        self._display.update(self._task, completed=self._begun)
        self._begun += 1
        self.say(line)

    def say(self, line: str) -> None:
        """Print a line above the bars. It is not wrapped: a command must stay one line, to be copied."""
        self._display.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def finish(self) -> None:
        """Count all stages as done."""
        self._display.update(self._task, completed=self._begun)


@contextlib.contextmanager
def one_display(description: str, stages: int) -> Iterator[Whole]:
    """Show all bars and stages within the block in one display, under a bar of so many `stages`."""
    with _new_bar() as display:
        whole = Whole(display, description, stages)
        token = _shared.set(display)
        try:
            yield whole
            whole.finish()
        finally:
            _shared.reset(token)


@contextlib.contextmanager
def _part_of(display: Progress) -> Iterator[Progress]:
    """Give `display`, and take what was added to it out of it again."""
    before = set(display.task_ids)
    try:
        yield display
    finally:
        for task in set(display.task_ids) - before:
            display.remove_task(task)


def _new_bar(disable: bool = False, auto_refresh: bool = True) -> Progress:
    return _LoggedProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        RemainingColumn(),
        console=Console(stderr=True, quiet=disable),
        disable=disable,
        auto_refresh=auto_refresh,
    )


@contextlib.contextmanager
def stage_display() -> Iterator[Stage]:
    """Give what shows stages of unknown length on stderr: on a terminal a spinner while one runs, and its time when it
    is done; elsewhere, so in logs, a line then, and now and then one while it runs. Within `one_display` it is a part
    of that.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _logged_stage
        return
    shared = _shared.get()
    if shared is not None:
        with _part_of(shared):
            yield lambda description: _stage_of(shared, description)
        return
    with Progress(
        SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
    ) as display:
        yield lambda description: _stage_of(display, description)


@contextlib.contextmanager
def _stage_of(display: Progress, description: str) -> Iterator[Callable[[str], None]]:
    task = display.add_task(description, total=1)
    yield lambda detail: display.update(task, description=f"{description}: {detail}")
    display.update(task, completed=1, description=description)


@contextlib.contextmanager
def _logged_stage(description: str) -> Iterator[Callable[[str], None]]:
    start = last = time.monotonic()

    def tell(detail: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LOG_EVERY:
            last = now
            print(f"{description}: {detail}", file=sys.stderr, flush=True)

    yield tell
    print(f"{description}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
