"""Smoothed rows: where one number of all rows is much larger than the others, part of it goes into the weights instead
(SmoothQuant, arXiv 2211.10438).

A row that is the elementwise product of two, one of which comes from a product with weights, as in a gated layer, can
have each of its numbers divided by any factor: that product's outputs are divided by it, and the weights that the row
meets are multiplied. The model is the same; rows in few bits lose less. Which numbers are large is seen on texts: by
their root mean squares, which a thousand tokens tell; the largest magnitudes, which the paper takes, need many more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ht_export.quantize.gptq import inputs_of_text
from ht_export.quantize.products import Array, Weights, change_product, products, stated
from ht_export.verify.traces import tapped_session
from runtime.bindings import GraphDims
from runtime.program import Advance

# How much of what stands out goes into the weights, in powers. Measured on SmolLM2: perplexity and the most probable
# token are best at this one, of 0.4 to 0.6.
SHARE = 0.45
LEAST = 1e-6


def root_mean_squares(
    graph: Path,
    dims: GraphDims,
    names: Sequence[str],
    texts: Sequence[Sequence[int]],
    advance: Advance = lambda *_: None,
) -> dict[str, Array]:
    """Return the root mean square [K] of each number of the rows of all texts, for values of the float32 graph."""
    compute = tapped_session(graph, names, small=True)
    squares: dict[str, Array] = {}
    count = 0
    for index, text in enumerate(texts):
        count += len(text)
        for name, rows in zip(names, compute(list(names), inputs_of_text(text, dims, drafts=False)), strict=True):
            found = np.square(rows).reshape(-1, rows.shape[-1]).sum(0)
            squares[name] = squares[name] + found if name in squares else found
        advance(index + 1, len(texts))
    return {name: np.sqrt(found / count) for name, found in squares.items()}


def gated_rows(graph: ir.Graph) -> list[str]:
    """Return the names of the rows that can be smoothed."""
    return [
        str(product.inputs[0].name)
        for product, _ in products(graph)
        if product.inputs[0] is not None and _made_by(product.inputs[0]) is not None
    ]


def smooth(graph: ir.Graph, sizes: dict[str, Array]) -> None:
    """Smooth rows of the graph of whose numbers the `sizes` [K], root mean squares, are known, in place."""
    for product, weights in list(products(graph)):
        rows = product.inputs[0]
        assert rows is not None
        made = _made_by(rows)
        if made is None or rows.name not in sizes:
            continue
        maker, columns = made
        of_weights = np.sqrt(np.square(weights.numbers()).mean(1)).clip(min=LEAST)
        factors = sizes[rows.name].clip(min=LEAST) ** SHARE / of_weights ** (1 - SHARE)
        change_product(graph, product, _times(factors[:, None]))
        change_product(graph, maker, _divided(factors, columns))


def _times(factors: Array) -> Callable[[Array], Array]:
    return lambda found: found * factors


def _divided(factors: Array, columns: slice) -> Callable[[Array], Array]:
    def change(found: Array) -> Array:
        found = found.copy()
        found[:, columns] /= factors
        return found

    return change


def _made_by(rows: ir.Value) -> tuple[ir.Node, slice] | None:
    """Return the product that one factor of `rows` [..., K] comes from, without a bias, and which of its columns that
    is; None where there is none, or where rows or factor are used elsewhere too.
    """
    gate = rows.producer()
    if gate is None or gate.op_type != "Mul" or len(rows.uses()) != 1:
        return None
    for factor in reversed(gate.inputs):
        if factor is None or len(factor.uses()) != 1:
            continue
        node, columns = factor.producer(), slice(None)
        if node is not None and node.op_type == "Split":
            source = node.inputs[0]
            if source is None or len(source.uses()) != 1 or source.producer() is None:
                continue
            split, node = node, source.producer()
            found = _columns(split, node, factor)
            if found is None:
                continue
            columns = found
        if node is not None and node.op_type == "MatMul" and Weights.of(node) is not None:
            return node, columns
    return None


def _columns(split: ir.Node, product: ir.Node | None, part: ir.Value) -> slice | None:
    """Return which columns of what `product` makes one `part` is that `split` makes of them."""
    weights = None if product is None or product.op_type != "MatMul" else Weights.of(product)
    if weights is None:
        return None
    if len(split.inputs) > 1:
        stated_sizes = stated(split.inputs[1])
        if stated_sizes is None:
            return None
        sizes = [int(size) for size in stated_sizes]
    else:
        # Equal ones, but for the last.
        sizes = [-(-weights.shape[1] // len(split.outputs))] * len(split.outputs)
    here = next(index for index, one in enumerate(split.outputs) if one is part)
    return slice(sum(sizes[:here]), sum(sizes[: here + 1]))
