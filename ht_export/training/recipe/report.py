"""`ht-train report`: what a fit came to, as Markdown with plots and as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.transfer import TransferFile, TransferLayers, load_transfer_layers
from ht_export.progress import progress_bar
from ht_export.prompts import evenly
from ht_export.training.cost import RowCosts, best_choice
from ht_export.training.data import AnsweredPrompt, read_data
from ht_export.training.evaluate import TextPredictions, predict, statistics
from ht_export.training.machine import fit_device
from ht_export.training.plots import plot_acceptance, plot_loss, plot_texts, plot_top_over_steps
from ht_export.training.recipe.history import History, read_history
from ht_export.training.recipe.markdown import markdown
from ht_export.training.recipe.speed import RowCost, row_cost_of
from ht_export.training.recipe.worth import Counts, gap, interval, learning_curve
from runtime.checks import number, whole
from runtime.errors import InputError
from runtime.files import atomic_path, check_writable, write_json

REPORT, NUMBERS = "report.md", "report.json"
ROWS = (16, 32)
# Statistics that the report shows.
SHOWN = ("top", "kl", "tokens_per_step", "ranks", "calibration")


def run_report(options: argparse.Namespace) -> None:
    """Write the report. Raises `InputError`."""
    check_writable(options.out / REPORT)
    whole("--texts", options.texts, 1)
    if options.row_cost is not None:
        number("--row-cost", options.row_cost, 0, 1)
    base = load_base_model(options.model, adapters=options.adapters)
    base.model.to(fit_device(options.device))
    transfer, about = load_transfer_layers(options.transfer, base.identity())
    least = transfer.num_steps + 1
    every = read_data(options.data, base, least)
    data = evenly(every, options.texts)
    held_out = evenly(read_data(options.held_out, base, least), options.texts)
    history = read_history(options.log) if options.log else History()
    cost = row_cost_of(base, options.engine, options.threads)
    if options.row_cost is not None:
        cost = RowCost(options.row_cost, "given")
    smaller = sorted((_smaller(path, base) for path in options.curve), key=lambda one: one[0])
    sizes = [texts for texts, _ in smaller]
    if smaller:
        sizes.append(_texts_of(about, f"--transfer {options.transfer}"))
        if len(set(sizes)) < len(sizes) or sizes != sorted(sizes):
            raise InputError(
                f"--curve needs fits to fewer texts each, and to fewer than {sizes[-1]}; these have {sizes[:-1]}"
            )
    with progress_bar() as progress:
        curve = [layers for _, layers in smaller]
        found = _numbers(base, transfer, data, held_out, cost, curve, sizes, progress)
    stored, measured = ({name: one.get(name) for name in SHOWN} for one in (about.acceptance, found["measured"]))
    if not _alike(stored, measured):
        # Nobody measured all of them, or not all that is shown.
        about = TransferFile(about.base_model, about.recipe, found.pop("measured"))
    found = {
        "model": about.base_model["name"],
        "transfer": str(options.transfer),
        "layers": list(transfer.layers),
        "draft_size": transfer.draft_size or None,
        "texts": len(every),
        "recipe": about.recipe,
        "history": asdict(history),
        "acceptance": about.acceptance,
        **found,
    }
    found.pop("measured", None)
    plots = _plots(found, history, options.out)
    with atomic_path(options.out / REPORT) as temporary:
        temporary.write_text(markdown(found, [plot.name for plot in plots]), encoding="utf-8")
    # The last: where it is, the report is whole.
    write_json(options.out / NUMBERS, found)


def _smaller(path: Path, base: BaseModel) -> tuple[int, TransferLayers]:
    """Return transfer layers of a fit to fewer texts, and how many."""
    transfer, about = load_transfer_layers(path, base.identity())
    return _texts_of(about, f"--curve {path}"), transfer


def _texts_of(about: TransferFile, told: str) -> int:
    """Return how many texts the file `told` was trained on. Raises `InputError` where it does not say."""
    data = about.recipe.get("data")
    texts = data.get("sequences") if isinstance(data, dict) else None
    if not isinstance(texts, int) or texts < 1:
        raise InputError(f"{told}: its recipe does not say how many texts it was trained on; fit it again")
    return texts


def _alike(found: Any, wanted: Any) -> bool:
    """Return whether statistics of a file have the form of those `wanted`, by which they are shown."""
    if isinstance(wanted, dict):
        same = isinstance(found, dict) and found.keys() == wanted.keys()
        return same and all(_alike(found[key], value) for key, value in wanted.items())
    if isinstance(wanted, list):
        # By draft step, or bins, of which there may be any number.
        bins = bool(wanted) and isinstance(wanted[0], dict) and "count" in wanted[0]
        return (
            isinstance(found, list)
            and (bins or len(found) == len(wanted))
            and all(_alike(one, wanted[0]) for one in found)
        )
    return isinstance(found, int | float)


def _numbers(
    base: BaseModel,
    transfer: TransferLayers,
    data: Sequence[AnsweredPrompt],
    held_out: Sequence[AnsweredPrompt],
    cost: RowCost,
    smaller: Sequence[TransferLayers],
    sizes: Sequence[int],
    progress: Progress,
) -> dict[str, Any]:
    """Return what is computed here, as JSON values. `sizes` are the texts that the fits of a learning curve had, those
    `smaller` and the whole one; none without a curve.
    """

    def drafts_of(layers: TransferLayers, texts: Sequence[AnsweredPrompt]) -> list[TextPredictions]:
        layers.to(base.model.device)
        return list(predict(base, layers, texts, progress=progress))

    learned, unseen = drafts_of(transfer, data), drafts_of(transfer, held_out)
    choice = best_choice(unseen, transfer.layers, RowCosts.of(base, cost.value, transfer.draft_size or None))
    by_rows = {str(rows): (Counts.of(learned, rows), Counts.of(unseen, rows)) for rows in ROWS}
    measured = statistics(unseen)
    found: dict[str, Any] = {
        "measured": measured,
        "speedup": {
            "row_cost": asdict(cost),
            "tree_rows": choice.sizes.tree_rows,
            "pseudo_rows": list(choice.sizes.pseudo_rows),
            "tokens_per_step": round(choice.tokens_per_step, 4),
            "cost": round(choice.cost, 4),
            "speedup": round(choice.speedup, 4),
        },
        "gap": {
            "texts": {"trained_on": len(data), "held_out": len(held_out)},
            "kl": {"trained_on": statistics(learned)["kl"], "held_out": measured["kl"]},
            "tokens_per_step": {
                rows: {
                    "trained_on": asdict(interval(ours)),
                    "held_out": asdict(interval(others)),
                    "gap": asdict(gap(ours, others)),
                }
                for rows, (ours, others) in by_rows.items()
            },
        },
        "learning_curve": None,
    }
    if smaller:
        counts = [Counts.of(drafts_of(layers, held_out), ROWS[-1]) for layers in smaller]
        points = learning_curve(sizes, [*counts, by_rows[str(ROWS[-1])][1]], transfer.num_steps + 1)
        found["learning_curve"] = {
            "measured": len(sizes),
            "points": [{"texts": texts, **asdict(value)} for texts, value in points],
        }
    return found


def _plots(found: dict[str, Any], history: History, folder: Path) -> list[Path]:
    plots = plot_acceptance(found["acceptance"], folder)
    if history.loss:
        plots.append(plot_loss(history.loss, folder / "loss.png"))
    if history.top:
        plots.append(plot_top_over_steps(history.top, folder / "top_over_steps.png"))
    if curve := found["learning_curve"]:
        points = [(one["texts"], one["value"], one["low"], one["high"]) for one in curve["points"]]
        plots.append(plot_texts(points, curve["measured"], folder / "texts.png"))
    return plots
