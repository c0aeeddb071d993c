"""Weight-only quantisation of a graph for ONNX Runtime: `com.microsoft.MatMulNBits` in the place of matrix products.

Weights are stored in blocks of 32 along the input dimension, each with a scale and a zero point, and rounded to the
nearest, or as `ht_export.calibration` rounds them. Products are computed in int8 with the rows' own scales, block by
block. The embedding stays as it is: a pass reads a few rows of it only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ht_export.blocks import BLOCK, blockwise
from ht_export.calibration import round_calibrated
from ht_export.lowering import CONTRIB

# Second moments of rows [K, K], by the name of the value that has them.
Moments = dict[str, NDArray[np.float64]]

BITS = {"int8": 8, "int4": 4}
# Of `MatMulNBits`: products in int8.
COMPUTE_INT8 = 4


def quantise(graph: Path, out: Path, precision: str, moments: Iterable[Moments] = ({},)) -> None:
    """Write the float32 graph at `graph` to `out`, weights quantised as BITS[precision] says; those for which there
    are second `moments` of the rows that they meet calibrated, all others rounded to the nearest.

    Its own weights may be at the place where those of `out` will be.
    """
    model = ir.load(graph)
    # All others when the last ones have come.
    for found, last in _with_last(moments):
        for node in list(model.graph):
            if node.op_type == "MatMul" and (weights := _weights(node)) is not None:
                rows = node.inputs[0]
                assert rows is not None
                if rows.name in found or last:
                    _replace(model.graph, node, weights, BITS[precision], found.get(rows.name or ""))
    model.opset_imports[CONTRIB] = 1
    RemoveUnusedNodesPass()(model)
    # What is left, and gone from the disk before more is written.
    ir.external_data.load_to_model(model)
    weights_file = out.with_name(f"{out.name}.data")
    weights_file.unlink(missing_ok=True)
    ir.save(model, out, external_data=weights_file.name)


def _with_last(found: Iterable[Moments]) -> Iterator[tuple[Moments, bool]]:
    """Yield each with whether it is the last one."""
    found = iter(found)
    held = next(found, {})
    for one in found:
        yield held, False
        held = one
    yield held, True


def _weights(product: ir.Node) -> ir.Value | None:
    """Return the weights of a product where it has any; they may be transposed, as the head's where they are tied."""
    value = product.inputs[1]
    assert value is not None
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
        assert value is not None
    is_matrix = value.const_value is not None and len(value.const_value.shape) == 2
    return value if value.is_initializer() and is_matrix else None


def _replace(
    graph: ir.Graph, product: ir.Node, weights: ir.Value, bits: int, moments: NDArray[np.float64] | None
) -> None:
    assert weights.const_value is not None
    array, ends = weights.const_value.numpy(), None
    if weights is product.inputs[1]:
        array = array.T
    if moments is not None:
        array, ends = round_calibrated(array, moments, bits)
    parts = zip(("quantised", "scales", "zero_points"), blockwise(array, bits, ends), strict=True)
    quantised = ir.node(
        "MatMulNBits",
        [product.inputs[0], *(_initializer(graph, f"{weights.name}.{part}", values) for part, values in parts)],
        {
            "K": array.shape[1],
            "N": array.shape[0],
            "bits": bits,
            "block_size": BLOCK,
            "accuracy_level": COMPUTE_INT8,
        },
        domain=CONTRIB,
    )
    output = product.outputs[0]
    quantised.outputs[0].type, quantised.outputs[0].shape = output.type, output.shape
    graph.insert_before(product, [quantised])
    ir.convenience.replace_all_uses_with(output, quantised.outputs[0])
    graph.remove(product, safe=True)


def _initializer(graph: ir.Graph, name: str, array: NDArray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
