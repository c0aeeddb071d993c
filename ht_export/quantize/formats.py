"""Formats in which engines store quantised weights and multiply with them: ONNX Runtime as `MatMulNBits`, TensorRT as
weights that `DequantizeLinear` turns into numbers just before a product, with which its builder fuses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import chain, count
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ht_export.graph.domains import CONTRIB
from ht_export.quantize.grid import BLOCK, Grid, packed_blocks

# Accuracy level of `MatMulNBits` that stands for products in int8.
COMPUTE_INT8 = 4
# Block size for TensorRT, which takes 64 and 128.
PLAN_BLOCK = 64
FLOAT8 = ml_dtypes.float8_e4m3fn
# The least scale that half precision has with all its digits.
LEAST_SCALE = float(np.finfo(np.float16).tiny)

Array = NDArray[np.float32]


class Storage(ABC):
    """The format of weights of one precision: `bits` each, their part of scales and zero points included. `grid` is
    what they are rounded to, None where that has no steps of one size; `rounds_rows` says that whole rows are rounded
    too, for which weights are prepared (`ht_export.quantize.prepare`); `opsets` are domains that the graph needs
    besides its own.
    """

    bits: float
    grid: Grid | None = None
    rounds_rows: ClassVar[bool] = False
    opsets: ClassVar[dict[str, int]] = {}

    def takes(self, columns: int) -> bool:
        """Return whether weights [N, columns] can be stored so; others stay as they are."""
        return columns > 0

    @abstractmethod
    def replace(self, graph: ir.Graph, product: ir.Node, name: str, weights: Array, ends: Array | None) -> None:
        """Let `product` compute with weights [N, K], which have this name. If they are rounded already, the grids hold
        the values of `ends`.
        """


class NBits(Storage):
    """`com.microsoft.MatMulNBits`: blocks of 32 weights with a scale and a zero point. Products are computed in int8
    with the rows' own scales, block by block.
    """

    opsets: ClassVar[dict[str, int]] = {CONTRIB: 1}

    def __init__(self, bits: int) -> None:
        self.grid: Grid = Grid(bits)
        self.bits = bits + (32 + bits) / BLOCK

    def replace(self, graph: ir.Graph, product: ir.Node, name: str, weights: Array, ends: Array | None) -> None:
        """See `Storage.replace`."""
        parts = zip(("quantised", "scales", "zero_points"), packed_blocks(weights, self.grid.bits, ends), strict=True)
        quantised = ir.node(
            "MatMulNBits",
            [product.inputs[0], *(initializer(graph, f"{name}.{part}", ir.tensor(values)) for part, values in parts)],
            {
                "K": weights.shape[1],
                "N": weights.shape[0],
                "bits": self.grid.bits,
                "block_size": BLOCK,
                "accuracy_level": COMPUTE_INT8,
            },
            domain=CONTRIB,
        )
        output = product.outputs[0]
        quantised.outputs[0].type, quantised.outputs[0].shape = output.type, output.shape
        graph.insert_before(product, [quantised])
        # Those of a head may be outputs of the graph, which keep their names.
        quantised.outputs[0].name = output.name
        ir.convenience.replace_all_uses_with(output, quantised.outputs[0], replace_graph_outputs=True)
        graph.remove(product, safe=True)


class Dequantised(Storage):
    """Weights [K, N] that `DequantizeLinear` multiplies by scales in half precision."""

    def replace(self, graph: ir.Graph, product: ir.Node, name: str, weights: Array, ends: Array | None) -> None:
        """See `Storage.replace`."""
        tensor, scales, attributes = self.stored(weights, ends)
        # Blocks of nothing but zeros have scale 0, and TensorRT takes positive ones only.
        scales = np.where(scales > 0, scales, 1)
        values = [
            initializer(graph, f"{name}.quantised", tensor),
            initializer(graph, f"{name}.scales", ir.tensor(np.ascontiguousarray(scales.astype(np.float16)))),
        ]
        node = ir.node("DequantizeLinear", values, attributes)
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT16, ir.Shape(weights.shape[::-1])
        graph.insert_before(product, [node])
        product.replace_input_with(1, node.outputs[0])

    @abstractmethod
    def stored(self, weights: Array, ends: Array | None) -> tuple[ir.TensorProtocol, Array, dict[str, Any]]:
        """Return weights [K, N], scales, and which numbers have the same, as attributes of `DequantizeLinear`."""


class Int8Columns(Dequantised):
    """8 bits, and a scale for each output."""

    # The scales are next to nothing.
    bits = 8
    grid = Grid(8, None, symmetric=True, stored=np.float16)

    def stored(self, weights: Array, ends: Array | None) -> tuple[ir.TensorProtocol, Array, dict[str, Any]]:
        """See `Dequantised.stored`."""
        values, scales, _ = self.grid.rounded(weights, ends)
        return ir.tensor(np.ascontiguousarray(values[:, 0].T.astype(np.int8))), scales[:, 0], {"axis": 1}


class Int4Blocks(Dequantised):
    """4 bits, and a scale for each output and 64 inputs."""

    bits = 4 + 16 / PLAN_BLOCK
    grid = Grid(4, PLAN_BLOCK, symmetric=True, stored=np.float16)

    def takes(self, columns: int) -> bool:
        """Return whether there are whole blocks, as TensorRT wants."""
        return columns % PLAN_BLOCK == 0

    def stored(self, weights: Array, ends: Array | None) -> tuple[ir.TensorProtocol, Array, dict[str, Any]]:
        """See `Dequantised.stored`."""
        values, scales, _ = self.grid.rounded(weights, ends)
        whole = np.ascontiguousarray(values.reshape(weights.shape).T.astype(np.int8))
        # Two in a byte, the first of them in its lower half; the number of columns [K, N] is even or odd.
        flat = np.pad(whole.reshape(-1), (0, whole.size % 2)).view(np.uint8)
        tensor = ir.PackedTensor(flat[::2] & 15 | flat[1::2] << np.uint8(4), ir.DataType.INT4, shape=whole.shape)
        return tensor, scales.T, {"axis": 0, "block_size": PLAN_BLOCK}


class Float8Columns(Dequantised):
    """Floating-point numbers of 8 bits (4 of exponent, 3 of mantissa), and a scale for each output."""

    bits = 8

    def stored(self, weights: Array, ends: Array | None) -> tuple[ir.TensorProtocol, Array, dict[str, Any]]:
        """See `Dequantised.stored`."""
        largest = np.abs(weights).max(axis=1)
        # In half precision before it is used, and not among its smallest: these numbers lose nothing by that.
        scales = np.maximum(largest / np.float32(ml_dtypes.finfo(FLOAT8).max), LEAST_SCALE)
        scales = scales.astype(np.float16).astype(np.float32)
        limit = float(ml_dtypes.finfo(FLOAT8).max)
        values = (weights / scales[:, None]).clip(-limit, limit).astype(FLOAT8)
        return ir.tensor(np.ascontiguousarray(values.T)), scales, {"axis": 1}


def initializer(graph: ir.Graph, name: str, tensor: Any) -> ir.Value:
    """Register `tensor` under this name, or one like it; return its value."""
    # Small matrices that are equal are one initializer, of several products.
    name = next(found for found in chain([name], (f"{name}.{n}" for n in count(2))) if found not in graph.initializers)
    tensor.name = name
    value = ir.val(name, const_value=tensor)
    graph.register_initializer(value)
    return value
