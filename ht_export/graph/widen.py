"""Graphs in half precision computed in float32, to compare them with the PyTorch reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ht_export.graph.lazy_weights import HALVES, cast_weights
from runtime.bindings import GraphDims


@contextlib.contextmanager
def in_float32(graph: Path, dims: GraphDims) -> Iterator[tuple[Path, GraphDims]]:
    """Give a graph that computes in float32 what the one at `graph` does, and its dimensions: itself, or another one
    beside it for as long as this lasts.
    """
    if dims.dtype == "float32":
        yield graph, dims
        return
    widened = graph.with_name(f"{graph.stem}.widened.onnx")
    try:
        write_widened(graph, widened)
        yield widened, replace(dims, dtype="float32")
    finally:
        widened.unlink(missing_ok=True)


def write_widened(graph: Path, out: Path) -> None:
    """Write the graph at `graph`, beside it, with float32 in the place of every half-precision type; its weights are
    those of `graph`, in the same file, and are cast where they are used.

    It computes what the graph does but for the rounding of each operation, on any runtime, and so tells a wrong graph
    from a rough one: in half precision no tolerance does.
    """
    model = ir.load(graph)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for name, attribute in list(node.attributes.items()):
            if name == "to" and attribute.value in [int(half) for half in HALVES]:
                node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in HALVES:
                node.attributes[name] = ir.AttrTensor(name, _widened(attribute.value))
        for value in node.outputs:
            _widen(value)
    for value in model.graph.inputs:
        _widen(value)
    # ONNX Runtime runs them all at once, and holds all weights in float32, unless they come before what makes the rows
    # of their product; then it runs each just before its product.
    first = model.graph[0]
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and node is not first:
            model.graph.remove(node)
            model.graph.insert_before(first, [node])
    cast_weights(model.graph)
    ir.save(model, out)


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _widen(value: ir.Value) -> None:
    if value.dtype in HALVES:
        value.dtype = ir.DataType.FLOAT
