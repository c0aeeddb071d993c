"""Precisions of an engine, and how a graph in half precision is compared with the PyTorch reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

# What users write, and what torch and `runtime.bindings` call it.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# With weight-only quantisation too: what the graph is traced and checked in, and computes in besides.
COMPUTED_IN = {**PRECISIONS, "int8": torch.float32, "int4": torch.float32}
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def write_widened(graph: Path, out: Path) -> None:
    """Write the graph at `graph`, beside it, with float32 in the place of every half-precision type; its weights are
    those of `graph`, in the same file, and are cast where they are used.

    It computes what the graph does but for the rounding of each operation, on any runtime, and so tells a wrong graph
    from a rough one: in half precision no tolerance does.
    """
    model = ir.load(graph)
    weights = [value for value in model.graph.initializers.values() if value.dtype in HALVES]
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
    first = model.graph[0]
    for value in weights:
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, value.shape
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        # That use too was replaced.
        cast.replace_input_with(0, value)
        model.graph.insert_before(first, [cast])
    ir.save(model, out)


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _widen(value: ir.Value) -> None:
    if value.dtype in HALVES:
        value.dtype = ir.DataType.FLOAT
