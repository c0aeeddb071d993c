"""Weights that are converted one at a time: none of what an export does has all of them in another precision at once.

A model is traced with parameters that have shape and precision but no memory of their own; the graph's initializers
read the real ones when they are written.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

IR_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@contextlib.contextmanager
def hollow(model: nn.Module, dtype: torch.dtype) -> Iterator[dict[str, nn.Parameter]]:
    """Put parameters of `dtype` that take no memory in the place of the model's; yield the real ones by name.

    The hollow parameters are objects of their own: the traced graph keeps some of those that it was traced with.
    """
    owners = [
        (module, name, f"{prefix}.{name}" if prefix else name, parameter)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    # Tied parameters stay tied.
    hollows = {parameter: _without_memory(parameter, dtype) for _, _, _, parameter in owners}
    try:
        for module, name, _, parameter in owners:
            setattr(module, name, hollows[parameter])
        yield {path: parameter for _, _, path, parameter in owners}
    finally:
        for module, name, _, parameter in owners:
            setattr(module, name, parameter)


def _without_memory(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    zeros = torch.zeros((), dtype=dtype).expand(parameter.shape)
    return nn.Parameter(zeros, requires_grad=parameter.requires_grad)


def written_as(parameter: nn.Parameter, dtype: torch.dtype, name: str) -> ir.LazyTensor:
    """Return the parameter for a graph, converted to `dtype` when it is written and not kept so.

    The graph does not keep the parameter either, so that the model must live until it is written: the rewriter's rules,
    which are global, hold on to the last graph that they saw, and would hold on to all weights.
    """
    held = weakref.ref(parameter)

    def convert() -> Tensor:
        found = held()
        assert found is not None, f"the model of {name} is gone before its graph was written"
        return found.data.to(dtype)

    return lazy(convert, IR_TYPES[dtype], tuple(parameter.shape), name)


def transposed(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """Return a matrix transposed when it is written."""
    rows, columns = tensor.shape.numpy()
    return lazy(lambda: tensor.numpy().T, tensor.dtype, (columns, rows), tensor.name)


def joined(tensors: Sequence[ir.TensorProtocol], name: str) -> ir.LazyTensor:
    """Return matrices [K, N_i] beside each other, [K, sum N_i], when they are written."""
    rows = tensors[0].shape.numpy()[0]
    columns = sum(tensor.shape.numpy()[1] for tensor in tensors)
    return lazy(lambda: np.concatenate([t.numpy() for t in tensors], axis=1), tensors[0].dtype, (rows, columns), name)


def lazy(make: Callable[[], Any], dtype: ir.DataType, shape: tuple[int, ...], name: str | None) -> ir.LazyTensor:
    """Return a tensor that is made, as numpy's or torch's, every time that it is asked for."""

    def evaluate() -> ir.TensorProtocol:
        made = make()
        if isinstance(made, Tensor):
            return TorchTensor(made.contiguous(), name=name)
        return ir.Tensor(np.ascontiguousarray(made), dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype, ir.Shape(shape), name=name)


def cast_weights(graph: ir.Graph) -> None:
    """Let initializers in half precision be cast to float32 where they are used."""
    first = graph[0]
    for value in list(graph.initializers.values()):
        assert value.const_value is not None
        if value.const_value.dtype in HALVES:
            value.dtype, value.shape = value.const_value.dtype, ir.Shape(value.const_value.shape.numpy())
            cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
            cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, value.shape
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            # That use too was replaced.
            cast.replace_input_with(0, value)
            graph.insert_before(first, [cast])


def widen_weights(graph: ir.Graph) -> None:
    """Let initializers that are cast, as by `cast_weights`, be in float32 when they are written."""
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "Cast" else None
        if value is None or value.const_value is None or value.dtype not in HALVES or len(value.uses()) > 1:
            continue
        value.const_value = widened(value.const_value)
        value.dtype = ir.DataType.FLOAT
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        graph.remove(node, safe=True)


def widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """Return a tensor in half precision that is in float32 when it is written."""
    shape = tuple(tensor.shape.numpy())
    return lazy(lambda: tensor.numpy().astype(np.float32), ir.DataType.FLOAT, shape, tensor.name)
