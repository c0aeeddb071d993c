"""Calibrated quantisation: weights rounded so that products with the rows of real text change least (GPTQ).

GPTQ (arXiv 2210.17323) rounds a matrix column by column and lets the columns that are left make up for each error, as
the second moments of the rows say that they can. ONNX Runtime 1.32 has it too, but reads the half of a triangular
matrix that is zero, and so rounds to the nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from ht_export.quantize.grid import Grid
from ht_export.verify.traces import tapped_session
from runtime.bindings import GraphDims
from runtime.engines.host_cache import KeyValueCache
from runtime.engines.layout import stack
from runtime.engines.onnxruntime import graph_inputs
from runtime.engines.protocol import Batch
from runtime.program import Advance
from runtime.rows import lay_out
from runtime.tree import chain

# Bytes of second moments that are gathered in one run over the texts.
GATHERED_AT_ONCE = 2 << 30

# Share of the mean of the second moments' diagonal that is added to it, as in the paper.
DAMPING = 0.01
# Columns whose errors reach those after them together: whole blocks, where these are smaller.
TOGETHER = 128


def second_moments(
    graph: Path, dims: GraphDims, texts: Sequence[Sequence[int]], advance: Advance = lambda *_: None
) -> Iterator[dict[str, NDArray[np.float64]]]:
    """Yield sums of x xT [K, K] over the rows x of all texts, for every value of the float32 graph that is multiplied
    by weights, by its name; as many together as memory is spared for.
    """
    groups = list(_groups(onnx.load(graph, load_external_data=False)))
    for number, names in enumerate(groups):
        compute = tapped_session(graph, names, small=True)
        found: dict[str, NDArray[np.float64]] = {}
        for index, text in enumerate(texts):
            for name, rows in zip(names, compute(names, inputs_of_text(text, dims)), strict=True):
                flat = rows.reshape(-1, rows.shape[-1])
                moments = flat.T @ flat
                found[name] = found[name] + moments if name in found else moments.astype(np.float64)
            advance(number * len(texts) + index + 1, len(groups) * len(texts))
        yield found


def round_calibrated(
    weights: NDArray[np.float32], moments: NDArray[np.float64], grid: Grid
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return weights [N, K] rounded to the grid for rows with these second moments [K, K]; and weights of the same
    shape whose least and largest values in each block decided what its grid is.
    """
    left = weights.copy()
    rounded, ends = np.empty_like(left), np.empty_like(left)
    # Row i says how the columns after i make up for an error in column i.
    factors = _factors(moments).astype(np.float32)
    columns = left.shape[1]
    width = grid.block or columns
    for start in range(0, columns, TOGETHER):
        end = min(start + TOGETHER, columns)
        errors = np.empty((len(left), end - start), dtype=np.float32)
        for column in range(start, end):
            if column % width == 0:
                block = slice(column, min(column + width, columns))
                ends[:, block] = left[:, block]
                scales, inverse, zero_points = grid.fit(left[:, block])
            whole = np.rint(left[:, column] * inverse + zero_points).clip(*grid.ends)
            rounded[:, column] = (whole - zero_points) * scales
            error = (left[:, column] - rounded[:, column]) / factors[column, column]
            errors[:, column - start] = error
            left[:, column + 1 : end] -= np.outer(error, factors[column, column + 1 : end])
        left[:, end:] -= errors @ factors[start:end, end:]
    return rounded, ends


def _factors(moments: NDArray[np.float64]) -> NDArray:
    """Return the upper triangle U [K, K] with UT U the inverse of the moments, made a little larger to have one."""
    diagonal = np.diag(moments)
    # A column that no row has: its weights may be anything.
    mean = diagonal.mean() or 1.0
    inverse = np.linalg.inv(moments + np.diag(np.where(diagonal > 0, DAMPING * mean, mean)))
    return np.linalg.cholesky((inverse + inverse.T) / 2).T


def _groups(model: onnx.ModelProto) -> Iterator[list[str]]:
    """Yield names of values that are multiplied by weights, in groups."""
    weights = {one.name: list(one.dims) for one in model.graph.initializer}
    sizes: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in ("Transpose", "Cast") and node.input[0] in weights:
            shape = weights[node.input[0]]
            weights[node.output[0]] = shape[::-1] if node.op_type == "Transpose" else shape
        elif node.op_type == "MatMul" and node.input[1] in weights:
            sizes[node.input[0]] = weights[node.input[1]][0]
    group: list[str] = []
    used = 0
    for name, size in sizes.items():
        if group and used + 8 * size**2 > GATHERED_AT_ONCE:
            yield group
            group, used = [], 0
        group.append(name)
        used += 8 * size**2
    if group:
        yield group


def inputs_of_text(text: Sequence[int], dims: GraphDims, drafts: bool = True) -> dict[str, NDArray]:
    """Return the graph's inputs for a whole text: with `drafts` after every token, all of which pass the layers as
    well, or without any.
    """
    tree = chain(text)
    drafted = np.arange(len(text) if drafts else 0)
    rows = lay_out(tree, (drafted,) * dims.num_steps, dims.join_order, 0)
    batch = Batch.of([rows], [KeyValueCache(dims)])
    return graph_inputs(stack(batch.rows, batch.lengths, dims.join_order), batch)
