"""Products in whole numbers on a CPU: weights rounded by output, rows by their own largest number.

A row's result never depends on what runs beside it: its scale is its own, and sums of whole numbers are exact in any
order. Where the processor multiplies bytes (VNNI), rows cost a third of those of `MatMulNBits`.

Rows that are known to be alike (`ht_export.quantize.rotate`) have one scale for all, which takes one node in the place
of five.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ht_export.graph.domains import CONTRIB
from ht_export.quantize.formats import Array, Storage, initializer
from ht_export.quantize.grid import Grid
from ht_export.quantize.rotate import behind_a_layers_norm

# Rows become whole numbers from -127 to 127, stored as bytes: MLAS multiplies unsigned rows by signed weights.
LARGEST = 127
ZERO_POINT = 128
# The largest number of rows whose root mean square is 1 and that are alike; those beyond it are cut. For numbers of a
# normal distribution the error of rounding and cutting is least at 3.9; what is measured hardly differs from 3.5 to 4.
LARGEST_ALIKE = 3.75


class ByRow(Storage):
    """`com.microsoft.MatMulIntegerToFloat`: 8 bits and a scale for each output; rows rounded to 8 bits each."""

    bits = 8
    grid = Grid(8, None, symmetric=True)
    rounds_rows = True
    opsets: ClassVar[dict[str, int]] = {CONTRIB: 1}

    def replace(self, graph: ir.Graph, product: ir.Node, name: str, weights: Array, ends: Array | None) -> None:
        """See `Storage.replace`."""
        source = product.inputs[0]
        assert source is not None
        if behind_a_layers_norm(source):
            scale, largest = _constant(graph, "alike_scale", np.float32(LARGEST_ALIKE / LARGEST)), None
            rows = _quantised(graph, product, source, scale)
        else:
            scale = _constant(graph, "row_scale", np.float32(1 / LARGEST))
            rows, largest = _rounded_rows(graph, product, source, scale)
        values, scales, _ = self.grid.rounded(weights, ends)
        whole = np.ascontiguousarray(values[:, 0].T.astype(np.int8))
        output = product.outputs[0]
        multiplied = ir.node(
            "MatMulIntegerToFloat",
            [
                rows,
                initializer(graph, f"{name}.quantised", ir.tensor(whole)),
                scale,
                initializer(graph, f"{name}.scales", ir.tensor(np.ascontiguousarray(scales[:, 0]))),
                _constant(graph, "row_zero_point", np.uint8(ZERO_POINT)),
            ],
            domain=CONTRIB,
        )
        nodes = [multiplied]
        if largest is not None:
            nodes.append(ir.node("Mul", [multiplied.outputs[0], largest]))
        for node in nodes:
            node.outputs[0].type, node.outputs[0].shape = output.type, output.shape
        graph.insert_before(product, nodes)
        made = nodes[-1].outputs[0]
        # Those of a head may be outputs of the graph, which keep their names.
        made.name = output.name
        ir.convenience.replace_all_uses_with(output, made, replace_graph_outputs=True)
        graph.remove(product, safe=True)


def _rounded_rows(graph: ir.Graph, product: ir.Node, rows: ir.Value, scale: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the `rows` [..., K] of `product` as bytes, and the largest number of each [..., 1]. Products of the same
    rows share them.

    A row of nothing but zeros is 0 / 0 before it is rounded to some byte, and multiplied by 0 after the product.
    """
    for use in rows.uses():
        if use.node.op_type == "Div" and (found := _rounded(use.node)) is not None:
            return found
    magnitudes = ir.node("Abs", [rows])
    largest = ir.node(
        "ReduceMax", [magnitudes.outputs[0], _constant(graph, "row_axis", np.array([-1]))], {"keepdims": 1}
    )
    divided = ir.node("Div", [rows, largest.outputs[0]])
    for node in (magnitudes, divided):
        node.outputs[0].type, node.outputs[0].shape = rows.type, rows.shape
    largest.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_before(product, [magnitudes, largest, divided])
    return _quantised(graph, product, divided.outputs[0], scale), largest.outputs[0]


def _quantised(graph: ir.Graph, product: ir.Node, rows: ir.Value, scale: ir.Value) -> ir.Value:
    """Return `rows` [..., K] as bytes with this scale, before `product`; those that exist, where any do."""
    for use in rows.uses():
        if use.node.op_type == "QuantizeLinear":
            return use.node.outputs[0]
    rounded = ir.node("QuantizeLinear", [rows, scale, _constant(graph, "row_zero_point", np.uint8(ZERO_POINT))])
    rounded.outputs[0].dtype, rounded.outputs[0].shape = ir.DataType.UINT8, rows.shape
    graph.insert_before(product, [rounded])
    return rounded.outputs[0]


def _rounded(division: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Return what `_rounded_rows` made, where `division` is part of that."""
    largest = division.inputs[1]
    producer = None if largest is None else largest.producer()
    uses = [use.node for use in division.outputs[0].uses()]
    if producer is None or producer.op_type != "ReduceMax" or [node.op_type for node in uses] != ["QuantizeLinear"]:
        return None
    assert largest is not None
    return uses[0].outputs[0], largest


def _constant(graph: ir.Graph, name: str, value: np.generic | np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(np.asarray(value), name=name)))
    return graph.initializers[name]
