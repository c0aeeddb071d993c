"""Precisions of an engine: what users write, what its graph computes in, and how its weights are stored."""

from __future__ import annotations

import torch

from ht_export.quantize.by_row import ByRow
from ht_export.quantize.formats import Float8Columns, Int4Blocks, Int8Columns, NBits, Storage
from runtime.errors import InputError

# By precision: for ONNX Runtime, and for TensorRT, whose graphs compute in half precision.
STORED: dict[str, Storage] = {"int8": ByRow(), "int4": NBits(4)}
STORED_IN_PLANS: dict[str, Storage] = {"int8": Int8Columns(), "int4": Int4Blocks(), "fp8": Float8Columns()}
# Precisions as users write them, and torch's; `runtime.bindings` has torch's names.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# All that users may write, those of quantised weights too.
CHOICES = tuple(dict.fromkeys([*PRECISIONS, *STORED, *STORED_IN_PLANS]))


def name_of(precision: str) -> str:
    """Return what `engine.json` calls a precision as users write it."""
    return str(PRECISIONS[precision]).removeprefix("torch.") if precision in PRECISIONS else precision


def storage_of(precision: str, is_plan: bool) -> tuple[torch.dtype, Storage | None]:
    """Return what a graph of this precision is traced and checked in, and computes in; and how its weights are stored
    if they are quantised.

    Raises `InputError` unless an engine can be had so.
    """
    if precision not in CHOICES:
        raise InputError(f"--precision must be one of {', '.join(CHOICES)}, not {precision}")
    if precision in PRECISIONS:
        return PRECISIONS[precision], None
    stored = STORED_IN_PLANS if is_plan else STORED
    if precision not in stored:
        raise InputError(
            f"--precision {precision}: ONNX Runtime has no products with such weights; use int8 or int4, or give an "
            "--out that ends in .plan"
        )
    return (torch.float16 if is_plan else torch.float32), stored[precision]
