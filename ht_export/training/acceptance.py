"""All that is measured of transfer layers on held-out text, as it is kept with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.progress import Progress

from ht_export.model.checkpoint import BaseModel
from ht_export.model.transfer import TransferLayers
from ht_export.training.data import AnsweredPrompt
from ht_export.training.evaluate import evaluate
from ht_export.training.foresight import fit_foresight
from runtime.tree import TreeSizes


def measure_acceptance(
    base: BaseModel, transfer: TransferLayers, data: Sequence[AnsweredPrompt], sizes: TreeSizes, progress: Progress
) -> dict[str, Any]:
    """Return the statistics of `transfer` on `data`, as JSON values: the `dtype` that they are of, those of
    `ht_export.training.evaluate.evaluate`, and the `foresight` that sampling uses.
    """
    return {
        "dtype": str(base.model.dtype).removeprefix("torch."),
        **evaluate(base, transfer, data, sizes, progress=progress),
        "foresight": fit_foresight(base, transfer, data, progress),
    }
