"""Settings of an export, and their check before any work."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from ht_export.model.shipped import Untrained, shipped_transfer
from ht_export.prompts import evenly, read_conversations
from ht_export.quantize.formats import Storage
from ht_export.quantize.precision import storage_of
from ht_export.staging import check_out
from ht_export.tensorrt.planner import Planner, PlanSettings
from runtime.bundle.engine_file import MOST_CHUNK
from runtime.errors import InputError
from runtime.tree import MOST_ROWS, TreeSizes

DEFAULT_TREE_ROWS = 4
PLAN_TREE_ROWS = 16

# Texts that quantisation is calibrated on, and tokens of each.
CALIBRATION_TEXTS = 64
CALIBRATION_TOKENS = 256


@dataclass(frozen=True)
class ExportSettings:
    """Options of an export: the engine's default row counts, the prompt tokens of a pass, its precision ("fp32",
    "fp16", "bf16", "int8" or "int4", or for plans "fp8"), the tokens of prompt and answer together, a file of prompts
    to calibrate quantisation on, and folders of adapters to merge into the base model.

    The defaults of ONNX engines had the best measured cost and simulated acceptance of some forty for SmolLM2-135M on
    two CPU cores, where rows are dear; on a GPU they cost little.
    """

    tree_rows: int | None = None
    pseudo_rows: tuple[int, ...] | None = None
    chunk: int | None = None
    precision: str | None = None
    max_context: int | None = None
    calibration: Path | None = None
    adapters: tuple[Path, ...] = ()

    def tree(self, num_steps: int, *, plan: bool = False) -> TreeSizes:
        """Return the row counts for K draft steps. Raises `InputError` when they do not fit."""
        default = PLAN_TREE_ROWS if plan else DEFAULT_TREE_ROWS
        tree_rows = default if self.tree_rows is None else self.tree_rows
        # On a CPU fewer for later steps, whose drafts are right less often.
        later = tree_rows if plan else (tree_rows + 1) // 2
        usual = (tree_rows, *(later,) * num_steps)[:num_steps]
        pseudo_rows = usual if self.pseudo_rows is None else self.pseudo_rows
        if len(pseudo_rows) != num_steps:
            raise InputError(
                f"--pseudo-rows has {len(pseudo_rows)} numbers, and the transfer layers have {num_steps} steps; "
                "give one number for each step"
            )
        if not 1 <= tree_rows <= MOST_ROWS or min(pseudo_rows) < 0 or max(pseudo_rows) > tree_rows:
            raise InputError(
                f"--tree-rows must be at least 1 and at most {MOST_ROWS}, and every number of --pseudo-rows between 0 "
                f"and it; not {tree_rows} and {','.join(map(str, pseudo_rows))}"
            )
        if any(later and not earlier for earlier, later in pairwise(pseudo_rows)):
            raise InputError(
                f"--pseudo-rows {','.join(map(str, pseudo_rows))}: a draft step needs the steps before "
                "it; give no rows to a step only if none after it has any"
            )
        return TreeSizes(tree_rows, pseudo_rows)


@dataclass(frozen=True)
class Checked:
    """All that is asked for, checked before any work: `dtype` is the precision that the graph is traced and checked in,
    `storage` how its weights are stored if they are quantised, `prompts` the texts to calibrate that on.
    """

    source: str
    transfer: Path | Untrained
    out: Path
    settings: ExportSettings
    precision: str
    dtype: torch.dtype
    storage: Storage | None
    planner: Planner | None
    prompts: list[str]

    @property
    def as_stored(self) -> bool:
        """True where the graph keeps weights as the checkpoint has them: quantised weights are rounded from those."""
        return self.storage is not None and self.planner is None


def check_settings(
    source: str,
    transfer_file: Path | Untrained | None,
    out: Path,
    settings: ExportSettings,
    plan_settings: PlanSettings | None,
) -> Checked:
    """Return what is asked for. Raises `InputError` for what cannot be, as far as that shows without the model."""
    check_out(out)
    checkpoint = Path(source)
    if checkpoint.is_dir() and out.parent.resolve() == checkpoint.resolve():
        raise InputError(f"{out} is in the folder of the checkpoint {source}; choose another folder for the engine")
    if settings.chunk is not None and not 1 <= settings.chunk <= MOST_CHUNK:
        raise InputError(f"--chunk must be at least 1 and at most {MOST_CHUNK}, not {settings.chunk}")
    is_plan = out.suffix == ".plan"
    precision = settings.precision or ("fp16" if is_plan else "fp32")
    dtype, storage = storage_of(precision, is_plan)
    planner = Planner(plan_settings or PlanSettings(), precision) if is_plan else None
    prompts = _calibration_prompts(settings.calibration, precision, storage)
    transfer = shipped_transfer(source) if transfer_file is None else transfer_file
    return Checked(source, transfer, out, settings, precision, dtype, storage, planner, prompts)


def _calibration_prompts(path: Path | None, precision: str, storage: Storage | None) -> list[str]:
    """Return prompts to calibrate on, evenly from the file. Raises `InputError`."""
    if path is None:
        return []
    if storage is None or storage.grid is None:
        raise InputError(
            f"--calibrate: {'nothing is quantised' if storage is None else 'weights are rounded to the nearest'} in "
            f"{precision}; use --precision int4, or leave it out"
        )
    return [one.turns[0] for one in evenly(read_conversations(path), CALIBRATION_TEXTS)]
