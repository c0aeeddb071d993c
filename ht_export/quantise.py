"""Weight-only quantisation of a graph for ONNX Runtime: `com.microsoft.MatMulNBits` in the place of matrix products.

Weights are stored in blocks of 32 along the input dimension, each with a scale and a zero point, and rounded to the
nearest. Products are computed in int8 with the rows' own scales, block by block. The embedding stays as it is: a pass
reads a few rows of it only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ht_export.lowering import CONTRIB

BITS = {"int8": 8, "int4": 4}
BLOCK = 32
# Of `MatMulNBits`: products in int8.
COMPUTE_INT8 = 4


def quantise(graph: Path, out: Path, precision: str) -> None:
    """Write the float32 graph at `graph` to `out`, weights quantised as BITS[precision] says.

    Its own weights may be at the place where those of `out` will be.
    """
    model = ir.load(graph)
    for node in list(model.graph):
        if node.op_type == "MatMul" and (weights := _weights(node)) is not None:
            _replace(model.graph, node, weights, BITS[precision])
    model.opset_imports[CONTRIB] = 1
    RemoveUnusedNodesPass()(model)
    # What is left, and gone from the disk before more is written.
    ir.external_data.load_to_model(model)
    weights_file = out.with_name(f"{out.name}.data")
    weights_file.unlink(missing_ok=True)
    ir.save(model, out, external_data=weights_file.name)


def blockwise(weights: NDArray[np.float32], bits: int) -> tuple[NDArray, NDArray, NDArray]:
    """Return weights [N, K] as `MatMulNBits` has them, with C blocks of 32, the last filled up with zeros.

    These are bytes [N, C, 32 bits / 8], scales [N, C] and zero points [N, C bits / 8], of 4 bits two in a byte.
    """
    rows, columns = weights.shape
    blocks = -(-columns // BLOCK)
    values = np.zeros((rows, blocks * BLOCK), dtype=np.float32)
    values[:, :columns] = weights
    values = values.reshape(rows, blocks, BLOCK)
    low, high = values.min(axis=-1).clip(max=0), values.max(axis=-1).clip(min=0)
    highest = 2**bits - 1
    scales = (high - low) / np.float32(highest)
    usable = scales > np.finfo(np.float32).tiny
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=usable)
    zero_points = np.rint(-low * inverse)
    # In place, for the head of a large model is large.
    values *= inverse[..., None]
    values += zero_points[..., None]
    np.rint(values, out=values).clip(0, highest, out=values)
    return _packed(values.astype(np.uint8), bits), scales, _packed(zero_points.astype(np.uint8), bits)


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return values of 4 bits two in a byte, the first of them in its lower half."""
    if bits == 8:
        return values
    odd = values.shape[-1] % 2
    even = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, odd)]) if odd else values
    return even[..., ::2] | even[..., 1::2] << np.uint8(4)


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


def _replace(graph: ir.Graph, product: ir.Node, weights: ir.Value, bits: int) -> None:
    assert weights.const_value is not None
    array = weights.const_value.numpy()
    if weights is product.inputs[1]:
        array = array.T
    parts = zip(("quantised", "scales", "zero_points"), blockwise(array, bits), strict=True)
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
