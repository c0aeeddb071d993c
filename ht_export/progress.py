"""Progress on the terminal: a bar for counted work, a ticking line for work that cannot be counted."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn


def progress_bar(*, disable: bool = False) -> Progress:
    """Return a bar with count, elapsed and remaining time, drawn on stderr unless disabled."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        RemainingColumn(),
        console=Console(stderr=True, quiet=disable),
        disable=disable,
    )


def stage_display() -> Progress:
    """Return a display for stages of unknown length: a spinner while a stage runs, its time when it is done."""
    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
