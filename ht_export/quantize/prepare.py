"""Weights made ready for few bits of rows: the same model, of which no number of a row stands out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ht_export.quantize.rotate import rotate
from ht_export.quantize.smooth import gated_rows, root_mean_squares, smooth
from runtime.bindings import GraphDims
from runtime.program import Advance


@dataclass(frozen=True)
class Prepared:
    """What was done: whether the residual stream is `rotated`, and how many products have `smoothed` rows."""

    rotated: bool
    smoothed: int


def prepare(
    graph: Path, out: Path, dims: GraphDims, texts: Sequence[Sequence[int]], advance: Advance = lambda *_: None
) -> Prepared:
    """Write the portable float32 graph at `graph` to `out`, rotated where its family allows that, and smoothed as
    `texts` say; its weights are changed one at a time, as they are written.
    """
    model = ir.load(graph)
    names = gated_rows(model.graph)
    # A rotation does not change these rows.
    sizes = root_mean_squares(graph, dims, names, texts, advance) if names else {}
    rotated = rotate(model.graph, dims.hidden_size)
    smooth(model.graph, sizes)
    RemoveUnusedNodesPass()(model)
    ir.save(model, out, external_data=f"{out.name}.data")
    return Prepared(rotated, len(sizes))
