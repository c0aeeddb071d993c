"""Plots of acceptance and of placement sweeps, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ht_export.training.sweep import SweepRow
from runtime.files import atomic_path

SIZE = (6.4, 4.0)


def plot_acceptance(found: dict[str, Any], folder: Path) -> list[Path]:
    """Draw statistics of `evaluate`: acceptance by top n and rank, reliability, tokens per step; return the files."""
    return [
        _plot_top(found, folder / "acceptance.png"),
        _plot_ranks(found, folder / "ranks.png"),
        _plot_reliability(found, folder / "calibration.png"),
        _plot_tokens(found, folder / "tokens_per_step.png"),
    ]


def plot_sweep(rows: Sequence[SweepRow], path: Path) -> Path:
    """Draw the candidates of a sweep: the cost of a pass against tokens per step, with lines of equal speed-up."""
    figure, axes = _axes("cost of a pass (plain passes)", "tokens per step")
    costs = [row["cost"] for row in rows]
    for row in rows:
        axes.plot(row["cost"], row["tokens_per_step"], "o" if row["finalist"] else ".", color="tab:blue")
        axes.annotate(
            row["name"], (row["cost"], row["tokens_per_step"]), fontsize=7, xytext=(4, 2), textcoords="offset points"
        )
    best = max(row["speedup"] for row in rows)
    ends = [min(costs), max(costs)]
    for speedup in (best, 0.95 * best, 0.9 * best):
        axes.plot(ends, [speedup * end for end in ends], ":", color="grey", linewidth=0.8)
    axes.set_title(f"dotted: equal speed-up ({best:.2f}, {0.95 * best:.2f}, {0.9 * best:.2f})", fontsize=9)
    return _save(figure, path)


def plot_loss(loss: dict[str, list[tuple[int, float]]], path: Path) -> Path:
    """Draw the training loss of each draft step over optimizer steps, smoothed over a fiftieth of them."""
    figure, axes = _axes("optimizer step", "loss (KL, nats)")
    for name, points in loss.items():
        steps, values = zip(*points, strict=True)
        width = max(1, len(values) // 50)
        smooth = [sum(values[max(0, at - width) : at + 1]) / min(at + 1, width + 1) for at in range(len(values))]
        axes.plot(steps, smooth, label=name)
    axes.legend()
    return _save(figure, path)


def plot_top_over_steps(top: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> Path:
    """Draw held-out top-n over optimizer steps: a line for each draft step and n, by name, then by n."""
    figure, axes = _axes("optimizer step", "share of held-out positions")
    for number, (name, by_n) in enumerate(top.items()):
        for depth, points in enumerate(by_n.values()):
            steps, values = zip(*points, strict=True)
            label = f"{name}, top {'/'.join(by_n)}" if not depth else None
            axes.plot(steps, values, "o-", color=f"C{number}", alpha=1 - 0.2 * depth, markersize=3, label=label)
    axes.set_ylim(0, 1)
    axes.legend()
    return _save(figure, path)


def plot_texts(points: Sequence[tuple[int, float, float, float]], measured: int, path: Path) -> Path:
    """Draw tokens per step over the number of texts, with intervals: `measured` points, then extrapolated ones."""
    figure, axes = _axes("texts trained on", "tokens per step, 32 rows")
    for chosen, style in ((points[:measured], "o-"), (points[measured - 1 :], "o:")):
        counts, values, low, high = zip(*chosen, strict=True)
        axes.plot(counts, values, style, color="tab:blue")
        axes.fill_between(counts, low, high, color="tab:blue", alpha=0.15)
    axes.set_xscale("log")
    return _save(figure, path)


def _plot_top(found: dict[str, Any], path: Path) -> Path:
    figure, axes = _axes("draft step", "share of positions")
    num_steps = len(found["kl"])
    for position, (n, shares) in enumerate(found["top"].items()):
        width = 0.8 / len(found["top"])
        places = [k + (position - (len(found["top"]) - 1) / 2) * width for k in range(1, num_steps + 1)]
        axes.bar(places, shares, width, label=f"top {n}")
    axes.set_xticks(range(1, num_steps + 1))
    axes.set_ylim(0, 1)
    axes.legend()
    return _save(figure, path)


def _plot_ranks(found: dict[str, Any], path: Path) -> Path:
    figure, axes = _axes("rank of the candidate", "share accepted, given the steps before")
    for k, shares in enumerate(found["ranks"], start=1):
        axes.semilogy(range(1, len(shares) + 1), [share or None for share in shares], "o-", label=f"step {k}")
    axes.legend()
    return _save(figure, path)


def _plot_reliability(found: dict[str, Any], path: Path) -> Path:
    figure, axes = _axes("draft probability", "share right, given the steps before")
    axes.plot([0, 1], [0, 1], ":", color="grey")
    for k, table in enumerate(found["calibration"], start=1):
        bins = table["bins"]
        label = f"step {k} (error {table['error']:.3f})"
        axes.plot([entry["predicted"] for entry in bins], [entry["observed"] for entry in bins], "o-", label=label)
    axes.legend()
    return _save(figure, path)


def _plot_tokens(found: dict[str, Any], path: Path) -> Path:
    figure, axes = _axes("tree rows, pseudo rows on each", "tokens per step")
    rows = [int(rows) for rows in found["tokens_per_step"]]
    axes.plot(rows, list(found["tokens_per_step"].values()), "o-")
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, [str(count) for count in rows])
    axes.set_ylim(bottom=1)
    return _save(figure, path)


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    # Not pyplot: it keeps figures alive and wants a display.
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return path
