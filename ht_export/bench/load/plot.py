"""A plot of results under load: tokens/s by arrivals, and requests that run over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from runtime.files import atomic_path


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw tokens/s of each way by arrivals, and how many requests ran over time, into one PNG file."""
    # Not pyplot: it keeps figures alive and wants a display.
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    speeds, running = figure.subplots(1, 2)
    levels = results["levels"]
    names = [level["arrivals"] for level in levels]
    for way in levels[0]["ways"]:
        values = [level["ways"][way]["tokens_per_second"] for level in levels]
        speeds.plot(range(len(names)), values, marker="o", label=way)
        for level in levels:
            looks = level["looks"][way]
            style = "-" if way == "speculative" else ":"
            running.plot([at for at, _, _ in looks], [count for _, count, _ in looks], style, linewidth=0.8)
    speeds.set_xticks(range(len(names)), names, rotation=20, ha="right")
    speeds.set_ylabel("tokens/s in all")
    speeds.set_ylim(bottom=0)
    speeds.legend()
    running.set_xlabel("seconds")
    running.set_ylabel("requests that run")
    for axes in (speeds, running):
        axes.grid(alpha=0.3, axis="y")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
