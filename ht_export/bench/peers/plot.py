"""A plot of results of `ht-bench peers`: tokens/s of each entry, by precision, for each number of clients."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ht_export.bench.peers.kinds import OURS
from ht_export.bench.peers.results import Results
from ht_export.bench.peers.summary import lines
from runtime.files import atomic_path

OWN, OTHER = "#c44e52", "#8c9bb0"


def plot(results: Results, path: Path) -> None:
    """Draw the median of the rounds, with the least and the most, into one PNG file; the texts are told beside it."""
    levels = lines(results)
    most = max(map(len, levels.values()))
    # Not pyplot: it keeps figures alive and wants a display.
    figure = Figure(figsize=(6.5 * len(levels), 1.2 + 0.34 * most), layout="constrained")
    for axes, (clients, level) in zip(figure.subplots(1, len(levels), squeeze=False)[0], levels.items(), strict=True):
        for place, line in enumerate(level):
            color = OWN if line.entry.peer == OURS.name else OTHER
            errors = [[line.tokens_per_second - line.least], [line.most - line.tokens_per_second]]
            axes.barh(place, line.tokens_per_second, color=color, xerr=errors, ecolor="black", capsize=2)
            axes.text(line.most, place, f"  {line.same}/{line.texts} texts", va="center", fontsize=7)
        axes.set_yticks(
            range(len(level)), [f"{line.entry.title}, {line.entry.precision}" for line in level], fontsize=8
        )
        axes.invert_yaxis()
        axes.set_xlabel("tokens/s, prompt included")
        axes.set_title("one client" if clients == 1 else f"{clients} clients at once", fontsize=9)
        axes.margins(x=0.15)
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle(
        f"{results.conditions['model']}, {results.conditions['device']}: texts that are the float32 model's own",
        fontsize=9,
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
