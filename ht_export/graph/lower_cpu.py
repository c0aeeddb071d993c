"""The graph made for ONNX Runtime on the CPU: fewer and larger operators, and a cache that is written in place.

Tree attention becomes what `lower_attention` adds, and its rows are not taken apart by head on the way to it. With one
buffer bound as past and as present the cache is not copied. Inputs and outputs of the lowered graph are
`GraphDims.lowered_inputs` and `GraphDims.lowered_outputs`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ht_export.graph.domains import CONTRIB, DOMAIN
from ht_export.graph.lower_attention import CacheAttention
from ht_export.graph.nodes import Nodes
from runtime import bindings
from runtime.bindings import GraphDims

# The version of the operators of ONNX that `TensorScatter` came with.
OPSET = 24
IR_VERSION = 11
# Head sizes that `GroupQueryAttention` takes are multiples of this.
HEAD_SIZES = 8


def can_be_lowered(dims: GraphDims) -> bool:
    """Return whether there is a lowered graph for these dimensions."""
    return dims.dtype == "float32" and dims.head_dim % HEAD_SIZES == 0


def lower_for_cpu(model: ir.Model, dims: GraphDims) -> None:
    """Rewrite the portable graph `model` of `dims`, which can be lowered, in place."""
    _Lowering(model.graph, dims).run()
    model.functions.clear()
    model.opset_imports[CONTRIB] = 1
    model.opset_imports[""] = OPSET
    model.ir_version = max(model.ir_version, IR_VERSION)
    # So that a runtime can tell it from the lowered graphs of earlier releases.
    model.metadata_props[bindings.REQUESTS] = bindings.PACKED
    RemoveUnusedNodesPass()(model)
    _fuse_residuals(model.graph)
    RemoveUnusedNodesPass()(model)


class _Lowering:
    def __init__(self, graph: ir.Graph, dims: GraphDims) -> None:
        self.graph = graph
        self.dims = dims
        given = {value.name: value for value in graph.inputs}
        for binding in dims.lowered_inputs():
            if binding.name in given:
                given[binding.name].shape = ir.Shape(binding.shape)
            elif binding.name in (bindings.SLOT_ROWS, bindings.ROW_SLOTS, bindings.ROW_PLACES):
                graph.inputs.append(ir.val(binding.name, dtype=ir.DataType.INT64, shape=ir.Shape(binding.shape)))
        self.inputs = {value.name: value for value in graph.inputs}
        self.before: ir.Node | None = None
        self.constants: dict[tuple[str, str], ir.Value] = {}
        self.nodes = Nodes("lowered", self.insert, self.constant)
        self.attention = CacheAttention(self.nodes, self.inputs, dims)

    def run(self) -> None:
        """Replace every tree attention, and the outputs."""
        caches = [self.lower(node) for node in list(self.graph) if node.domain == DOMAIN]
        outputs = [*self.graph.outputs[:2], *(key for key, _ in caches), *(value for _, value in caches)]
        self.graph.outputs.clear()
        self.graph.outputs.extend(outputs)
        for output, binding in zip(outputs, self.dims.lowered_outputs(), strict=True):
            output.name = binding.name
            output.dtype = ir.DataType.FLOAT
            output.shape = ir.Shape(binding.shape)

    def lower(self, attention: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Replace one node; return its layer's keys and values, cached and new."""
        self.before = attention
        query, key, value, key_cache, value_cache, _, mask = attention.inputs[:7]
        first = attention.inputs[7] if len(attention.inputs) > 7 else None
        assert query is not None and key is not None and value is not None and mask is not None
        assert key_cache is not None and value_cache is not None
        heads, kv_heads = self.dims.query_heads, self.dims.key_value_heads
        rows = [self.by_row(query, heads), self.by_row(key, kv_heads), self.by_row(value, kv_heads)]
        numbers = {name: attribute.as_float() for name, attribute in attention.attributes.items()}
        out, keys, values = self.attention.attend(rows, [key_cache, value_cache], mask, first, numbers)
        self.replace(attention.outputs[0], out)
        return keys, values

    def by_row(self, value: ir.Value, heads: int) -> ir.Value:
        """Return `value` [B, H, R, D] as [B, R, H D], from before it was taken apart where that can be found."""
        node = value.producer()
        if node is not None and node.op_type == "RotaryEmbedding":
            inner, cos, sin = node.inputs[:3]
            assert inner is not None
            interleaved = node.attributes["interleaved"].as_int()
            rows = self.by_row(inner, heads)
            return self.nodes.one("RotaryEmbedding", [rows, cos, sin], {"interleaved": interleaved, "num_heads": heads})
        if node is not None and _swaps_rows_and_heads(node):
            assert node.inputs[0] is not None
            reshape = node.inputs[0].producer()
            if reshape is not None and reshape.op_type == "Reshape" and _rank(reshape.inputs[0]) == 3:
                assert reshape.inputs[0] is not None
                return reshape.inputs[0]
        swapped = self.nodes.one("Transpose", [value], {"perm": [0, 2, 1, 3]})
        return self.nodes.one("Reshape", [swapped, self.constant([0, 0, heads * self.dims.head_dim])])

    def replace(self, output: ir.Value, rows: ir.Value) -> None:
        """Put `rows` [B, R, Hq D] in the place of `output` [B, Hq, R, D], or of what it is made into."""
        uses = list(output.uses())
        if len(uses) == 1 and _swaps_rows_and_heads(uses[0].node):
            after = list(uses[0].node.outputs[0].uses())
            if len(after) == 1 and after[0].node.op_type == "Reshape" and _rank(after[0].node.outputs[0]) == 3:
                ir.convenience.replace_all_uses_with(after[0].node.outputs[0], rows)
                return
        shape = self.constant([0, 0, self.dims.query_heads, self.dims.head_dim])
        apart = self.nodes.one("Transpose", [self.nodes.one("Reshape", [rows, shape])], {"perm": [0, 2, 1, 3]})
        ir.convenience.replace_all_uses_with(output, apart)

    def insert(self, node: ir.Node) -> None:
        assert self.before is not None
        self.graph.insert_before(self.before, [node])

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        array = np.array(value, dtype=dtype)
        key = (str(array.tolist()), str(array.dtype))
        if key not in self.constants:
            name = f"lowered_{len(self.constants)}"
            found = ir.val(name, const_value=ir.tensor(array, name=name))
            self.graph.register_initializer(found)
            self.constants[key] = found
        return self.constants[key]


def _fuse_residuals(graph: ir.Graph) -> None:
    """Put `SkipSimplifiedLayerNormalization` in the place of a residual sum and the normalisation that follows it."""
    for node in list(graph):
        if node.op_type != "RMSNormalization" or node.inputs[0] is None:
            continue
        total = node.inputs[0].producer()
        if total is None or total.op_type != "Add" or not all(_is_hidden(value) for value in total.inputs):
            continue
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*total.inputs, node.inputs[1]],
            {"epsilon": node.attributes["epsilon"].as_float()},
            num_outputs=4,
            domain=CONTRIB,
        )
        graph.insert_before(total, [fused])
        for old, new in ((node.outputs[0], fused.outputs[0]), (total.outputs[0], fused.outputs[3])):
            # The sum is a term of the next one, which is recognised by its shape.
            new.type, new.shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new)


def _is_hidden(value: ir.Value | None) -> bool:
    return value is not None and not value.is_initializer() and _rank(value) == 3


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _swaps_rows_and_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and node.attributes["perm"].as_ints() == (0, 2, 1, 3)
