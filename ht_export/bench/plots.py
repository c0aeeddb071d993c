"""Plots of results, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ht_export.bench.settings import PLAIN, SPECULATIVE
from ht_export.bench.table import TITLES
from runtime.files import atomic_path

FILES = ("speedup.png", "tokens_per_step.png", "acceptance.png")


def plot_results(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw speed-up and tokens per step of each way by task, and acceptance by depth; return the files."""
    groups = [("overall", results["overall"]), *((task or "(none)", one) for task, one in results["tasks"].items())]
    drawn = [
        _bars(groups, "speedup", "speed-up over plain decoding"),
        _bars(groups, "tokens_per_step", "tokens per step"),
        _acceptance(results),
    ]
    paths = [folder / name for name in FILES]
    for figure, path in zip(drawn, paths, strict=True):
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    return paths


def _bars(groups: Sequence[tuple[str, dict[str, Any]]], key: str, label: str) -> Figure:
    """Draw a group of bars for each task, a bar in it for each way; plain decoding is the line at its own height."""
    ways = [way for way in groups[0][1]["ways"] if way != PLAIN]
    figure, axes = _figure(max(7.0, 2.0 + 0.3 * len(groups) * (len(ways) + 1)))
    width = 0.8 / len(ways)
    for index, way in enumerate(ways):
        places = [group + (index - (len(ways) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(places, [one["ways"][way][key] for _, one in groups], width, label=_title(way))
    axes.axhline(1.0, color="black", linewidth=0.8, label="plain")
    axes.set_xticks(range(len(groups)), [task for task, _ in groups], rotation=30, ha="right")
    axes.set_ylabel(label)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _acceptance(results: dict[str, Any]) -> Figure:
    figure, axes = _figure(7.0)
    for way, summary in results["overall"]["ways"].items():
        if summary["acceptance"]:
            _line(axes, summary["acceptance"], label=_title(way), linewidth=2.0)
    for task, summary in results["tasks"].items():
        label = f"{_title(SPECULATIVE)}: {task or '(none)'}"
        _line(axes, summary["acceptance"], label=label, linewidth=0.8, linestyle=":")
    axes.set_xlabel("depth")
    axes.set_ylabel("share of steps that accepted one less")
    axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _line(axes: Any, shares: Sequence[float], **style: Any) -> None:
    axes.plot(range(1, len(shares) + 1), shares, marker="o", **style)


def _title(way: str) -> str:
    return TITLES.get(way, way).replace("`", "")


def _figure(width: float) -> tuple[Figure, Any]:
    # Not pyplot: it keeps figures alive and wants a display.
    figure = Figure(figsize=(width, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3, axis="y")
    return figure, axes
