"""The speed-up to expect on this device: from drafts on held-out text and the measured cost of a row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ht_export.model.checkpoint import BaseModel
from ht_export.training.cost import RowCosts
from runtime.bundle.engine_file import read_engine_file
from runtime.bundle.tuning_file import read_tuning
from runtime.drafting.sizing import Menu
from runtime.tuning import cpu_name

# A CPU with few cores, where nothing was measured.
USUAL_ROW_COST = 0.05
# Passes of more rows cost less a row, and are not those that pay.
MOST_ROWS = 16


@dataclass(frozen=True)
class RowCost:
    """The cost of one more row in plain passes, and where the number is from."""

    value: float
    source: str


def row_cost_of(base: BaseModel, engine: Path | None, threads: int | None) -> RowCost:
    """Return what a row costs in the passes that were timed of `engine` on this CPU, else the usual cost."""
    if engine is not None and engine.is_file():
        about = read_engine_file(engine)
        tuning = read_tuning(engine, about.identity, cpu_name(threads), about.dims)
        if tuning is not None:
            costs = RowCosts.of(base, 0.0, about.dims.draft_size)
            value = fitted(tuning.menu, costs, about.dims.transfer_layers)
            return RowCost(round(value, 4), f"passes of the {about.precision} engine {engine}, {tuning.device}")
    return RowCost(USUAL_ROW_COST, "not measured: the usual cost on a CPU with few cores; give --row-cost")


def fitted(menu: Menu, costs: RowCosts, layers: tuple[int, ...]) -> float:
    """Return the row cost that explains the times of a menu at its shortest context best, by least squares."""
    rows, more = [], []
    for sizes, seconds in zip(menu.sizes, menu.seconds[0], strict=True):
        if sizes.tree_rows <= MOST_ROWS:
            pseudo = (count * costs.pseudo_row(layer) for count, layer in zip(sizes.pseudo_rows, layers, strict=True))
            rows.append(sizes.tree_rows - 1 + sum(pseudo))
            more.append(seconds / menu.seconds[0, 0] - 1)
    weight = float(np.dot(rows, rows))
    return min(1.0, max(0.0, float(np.dot(rows, more)) / weight)) if weight else USUAL_ROW_COST
