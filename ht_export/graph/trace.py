"""From the PyTorch reference to one ONNX graph, with `TreeAttention` as a local function of standard operators."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import BOOL, FLOAT, INT64, script
from onnxscript import opset23 as op
from onnxscript.values import Opset
from torch import Tensor, nn

from ht_export.graph.domains import DOMAIN, DOMAIN_VERSION, OPSET
from ht_export.graph.fuse import simplify, use_fused_operators
from ht_export.graph.layers import TracedLayers
from ht_export.graph.lazy_weights import cast_weights, hollow, transposed, written_as
from ht_export.model.attention import LayerAttention
from ht_export.model.dims import graph_dims
from ht_export.model.reference import HiddenTransferModel
from runtime.bindings import GraphDims


@script(Opset(DOMAIN, DOMAIN_VERSION), default_opset=op)  # type: ignore[untyped-decorator]
def TreeAttention(  # noqa: N802 (the operator's name)
    query: FLOAT,
    key_new: FLOAT,
    value_new: FLOAT,
    key_cache: FLOAT,
    value_cache: FLOAT,
    cache_length: INT64,
    tree_mask: BOOL,
    scale: float,
    softcap: float,
) -> FLOAT:
    """Body of the local function; what it computes is defined by `plugins.reference.tree_attention`."""
    rows = op.Shape(query, start=2, end=3)
    capacity = op.Shape(key_cache, start=2, end=3)
    slots = op.Range(op.Constant(value_int=0), op.Squeeze(capacity), op.Constant(value_int=1))
    valid = op.Less(op.Unsqueeze(slots, [0]), op.Unsqueeze(cache_length, [1]))
    cache_mask = op.Expand(op.Unsqueeze(valid, [1]), op.Concat(op.Constant(value_ints=[1]), rows, capacity, axis=0))
    mask = op.Unsqueeze(op.Concat(cache_mask, tree_mask, axis=-1), [1])
    keys = op.Concat(key_cache, key_new, axis=2)
    values = op.Concat(value_cache, value_new, axis=2)
    output = op.Attention(query, keys, values, mask, scale=scale, softcap=softcap)
    return output  # noqa: RET504 (returned directly, it would be a tuple of the operator's four outputs)


@script(Opset(DOMAIN, DOMAIN_VERSION), default_opset=op)  # type: ignore[untyped-decorator]
def WindowedTreeAttention(  # noqa: N802 (the operator's name)
    query: FLOAT,
    key_new: FLOAT,
    value_new: FLOAT,
    key_cache: FLOAT,
    value_cache: FLOAT,
    cache_length: INT64,
    tree_mask: BOOL,
    first_visible: INT64,
    scale: float,
    softcap: float,
) -> FLOAT:
    """`TreeAttention` whose rows see the cache from row `first_visible` [B, R] on."""
    capacity = op.Shape(key_cache, start=2, end=3)
    slots = op.Range(op.Constant(value_int=0), op.Squeeze(capacity), op.Constant(value_int=1))
    valid = op.Unsqueeze(op.Less(op.Unsqueeze(slots, [0]), op.Unsqueeze(cache_length, [1])), [1])
    cache_mask = op.And(valid, op.GreaterOrEqual(slots, op.Unsqueeze(first_visible, [2])))
    mask = op.Unsqueeze(op.Concat(cache_mask, tree_mask, axis=-1), [1])
    keys = op.Concat(key_cache, key_new, axis=2)
    values = op.Concat(value_cache, value_new, axis=2)
    output = op.Attention(query, keys, values, mask, scale=scale, softcap=softcap)
    return output  # noqa: RET504 (as above)


FUNCTIONS = {"TreeAttention": TreeAttention, "WindowedTreeAttention": WindowedTreeAttention}


def build_graph(model: HiddenTransferModel, dtype: torch.dtype | None = None, *, as_stored: bool = False) -> ir.Model:
    """Trace `model` and return the ONNX model whose inputs and outputs are those of `runtime.bindings`.

    `dtype` None takes the precision that the weights are in. They are read, and converted, when the model is saved;
    `as_stored` leaves matrices in half precision where they are so, and lets a float32 graph cast them.
    """
    dtype = dtype or model.base.dtype
    dims = graph_dims(model.base.config, model.transfer, str(dtype).removeprefix("torch."))
    attention, model.attention = model.attention, _symbolic_tree_attention
    try:
        with hollow(model, dtype) as weights:
            onnx_model = _trace(model, dims)
    finally:
        model.attention = attention
    _use_weights(onnx_model.graph, weights, dtype, as_stored)
    # TreeAttention is an opaque node to these, and its function is added afterwards.
    simplify(onnx_model)
    use_fused_operators(onnx_model)
    _name_bindings(onnx_model, dims)
    used = {node.op_type for node in onnx_model.graph if node.domain == DOMAIN}
    for name in sorted(used):
        function = ir.serde.deserialize_function(FUNCTIONS[name].to_function_proto())
        onnx_model.functions[function.identifier()] = function
    onnx_model.opset_imports[DOMAIN] = DOMAIN_VERSION
    if as_stored:
        cast_weights(onnx_model.graph)
    onnx_model.graph.name = "hidden_transfer"
    _forget_origin(onnx_model)
    return onnx_model


class _AroundLayers(nn.Module):
    """The reference's logits alone: its layers, and with them the caches, are stamped in afterwards."""

    def __init__(self, model: HiddenTransferModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        tree_mask: Tensor,
        pseudo_parents: list[Tensor],
        logit_rows: Tensor,
        cache_length: Tensor,
    ) -> tuple[Tensor, Tensor]:
        output = self.model(
            input_ids, position_ids, tree_mask, pseudo_parents, logit_rows, cache_length, key_cache=[], value_cache=[]
        )
        return output.logits.to(torch.float32), output.draft_logits.to(torch.float32)


def _trace(model: HiddenTransferModel, dims: GraphDims) -> ir.Model:
    # Sizes all differ, so that the tracer cannot take two dimensions for one.
    batch, tree, wanted, capacity = 2, 5, 3, 7
    pseudo = [11 + 2 * k for k in range(dims.num_steps)]
    rows = tree + sum(pseudo)
    example = (
        torch.zeros(batch, tree, dtype=torch.int64),
        torch.zeros(batch, rows, dtype=torch.int64),
        torch.ones(batch, rows, rows, dtype=torch.bool),
        [torch.zeros(batch, size, dtype=torch.int64) for size in pseudo],
        torch.zeros(batch, wanted, dtype=torch.int64),
        torch.full((batch,), capacity, dtype=torch.int64),
    )
    # The tracer reasons about sizes from 2 on, and R is a sum of them. The graph itself holds for 0 and 1 too, which
    # the parity check before "done" and the tests run.
    dim = torch.export.Dim
    b = dim("B")
    r = dim("R", min=2 * (dims.num_steps + 1))
    shapes = (
        {0: b, 1: dim("T")},
        {0: b, 1: r},
        {0: b, 1: r, 2: r},
        [{0: b, 1: dim(f"R_{k + 1}")} for k in range(dims.num_steps)],
        {0: b, 1: dim("M")},
        {0: b},
    )
    with _quiet(), torch.no_grad():
        layers = TracedLayers(model, _exported)
        with layers.opaque():
            traced = _exported(_AroundLayers(model), example, shapes)
    layers.stamp(traced)
    return traced


def _exported(module: nn.Module, example: tuple[Any, ...], shapes: tuple[Any, ...]) -> ir.Model:
    program = torch.export.export(
        module.eval(),
        example,
        dynamic_shapes=shapes,
        strict=False,
        # Without this, that R is the sum of the other sizes would be refused as a constraint on R.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    traced = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    assert traced is not None
    return traced.model


def _use_weights(graph: ir.Graph, weights: dict[str, nn.Parameter], dtype: torch.dtype, as_stored: bool) -> None:
    """Let the graph's initializers be the real weights, and those that are used transposed only be so. Matrices
    `as_stored` may have another type than their value: `cast_weights` puts that right.
    """
    for name, value in graph.initializers.items():
        # As `_AroundLayers` has them.
        real = weights.get(name.removeprefix("model."))
        if real is not None:
            keep = as_stored and real.ndim == 2 and real.dtype.itemsize < dtype.itemsize
            value.const_value = written_as(real, real.dtype if keep else dtype, name)
            uses = list(value.uses())
            if len(uses) == 1 and uses[0].node.op_type == "Transpose" and len(real.shape) == 2:
                value.const_value = transposed(value.const_value)
                value.shape = value.const_value.shape
                ir.convenience.replace_all_uses_with(uses[0].node.outputs[0], value)
                graph.remove(uses[0].node, safe=True)


def _symbolic_tree_attention(
    query: Tensor,
    key_new: Tensor,
    value_new: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_length: Tensor,
    tree_mask: Tensor,
    first_visible: Tensor | None,
    how: LayerAttention,
) -> Tensor:
    inputs = [query, key_new, value_new, key_cache, value_cache, cache_length, tree_mask]
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{'TreeAttention' if first_visible is None else 'WindowedTreeAttention'}",
        inputs if first_visible is None else [*inputs, first_visible],
        # 0 for none: not every runtime knows default values of a function's attributes.
        attrs={"scale": how.scale, "softcap": how.softcap or 0.0},
        dtype=query.dtype,
        shape=query.shape,
        version=DOMAIN_VERSION,
    )


def _name_bindings(model: ir.Model, dims: GraphDims) -> None:
    for values, contract in ((model.graph.inputs, dims.inputs()), (model.graph.outputs, dims.outputs())):
        assert len(values) == len(contract), "the traced graph has other bindings than the contract"
        for value, binding in zip(values, contract, strict=True):
            assert value.dtype == getattr(ir.DataType, _IR_NAMES[binding.dtype]), binding
            value.name = binding.name
            value.shape = ir.Shape(binding.shape)


def _forget_origin(model: ir.Model) -> None:
    """Drop the tracer's notes on where each node came from: they hold paths of this machine and triple the file."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


_IR_NAMES = {"int64": "INT64", "bool": "BOOL", "float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracer's remarks about its own insides off the terminal; its errors are exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
