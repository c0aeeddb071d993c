"""Progress on the terminal: a bar for counted work, a ticking line for work that cannot be counted."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn


def progress_bar(*, disable: bool = False, auto_refresh: bool = True) -> Progress:
    """Return a bar with count, elapsed and remaining time, drawn on stderr unless disabled.

    Without `auto_refresh` it is drawn when it is told to, and takes no time beside what is timed.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        RemainingColumn(),
        console=Console(stderr=True, quiet=disable),
        disable=disable,
        auto_refresh=auto_refresh,
    )


def stage_display() -> Progress:
    """Return a display for stages of unknown length: a spinner while a stage runs, its time when it is done."""
    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
