"""The graph made for ONNX Runtime on the CPU: fewer and larger operators, and a cache that is written in place.

Tree attention becomes `com.microsoft.GroupQueryAttention`, which reads the valid rows of the cache where they are and
writes the new rows behind them. With one buffer bound as past and as present nothing else is copied. The lowered graph
has the inputs of the portable one, and the outputs `GraphDims.lowered_outputs`. It is for one sequence: B is 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ht_export.graph.domains import CONTRIB, DOMAIN
from runtime.bindings import CACHE_LENGTH, GraphDims

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
    RemoveUnusedNodesPass()(model)
    _fuse_residuals(model.graph)
    RemoveUnusedNodesPass()(model)


class _Visible:
    """Inputs of `GroupQueryAttention` for the rows that share a tree mask: lengths, and what each row sees."""

    def __init__(self, lengths: ir.Value, longest: ir.Value, bias: ir.Value) -> None:
        self.lengths = lengths
        self.longest = longest
        self.bias = bias


class _Lowering:
    def __init__(self, graph: ir.Graph, dims: GraphDims) -> None:
        self.graph = graph
        self.dims = dims
        self.cache_length = next(value for value in graph.inputs if value.name == CACHE_LENGTH)
        self.visible: dict[tuple[ir.Value, ir.Value | None], _Visible] = {}
        self.before: ir.Node | None = None
        self.constants: dict[tuple[str, str], ir.Value] = {}

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
        if (mask, first) not in self.visible:
            self.visible[mask, first] = self.describe(mask, first)
        visible = self.visible[mask, first]
        heads, kv_heads = self.dims.query_heads, self.dims.key_value_heads
        rows = [self.by_row(query, heads), self.by_row(key, kv_heads), self.by_row(value, kv_heads)]
        node = ir.node(
            "GroupQueryAttention",
            [*rows, key_cache, value_cache, visible.lengths, visible.longest, None, None, None, visible.bias],
            {
                "num_heads": heads,
                "kv_num_heads": kv_heads,
                **{name: attribute.as_float() for name, attribute in attention.attributes.items()},
                **self.direction(),
            },
            num_outputs=3,
            domain=CONTRIB,
        )
        self.graph.insert_before(attention, [node])
        self.replace(attention.outputs[0], node.outputs[0])
        return node.outputs[1], node.outputs[2]

    def direction(self) -> dict[str, int]:
        """Return the attribute that lets rows see later ones where some do: steps that join before those before them.

        Where none do it is left out, for ONNX Runtime did not always have it.
        """
        in_order = list(self.dims.join_order) == sorted(self.dims.join_order)
        return {} if in_order else {"causal": 0}

    def describe(self, mask: ir.Value, first: ir.Value | None) -> _Visible:
        """Return what rows under `mask` [B, R, R] see: of the cache's valid rows all, or those from `first` [B, R] on,
        and each other as it says.
        """
        one, zero = self.constant([1]), self.constant([0])
        count = self.add("Shape", [mask], {"start": 1, "end": 2})
        total = self.add("Add", [self.cache_length, count])
        lengths = self.add("Cast", [self.add("Sub", [total, one])], {"to": int(ir.DataType.INT32)})
        longest = self.add("Cast", [self.add("Squeeze", [total, zero])], {"to": int(ir.DataType.INT32)})
        if first is None:
            cached = self.add("Concat", [one, count, self.cache_length], {"axis": 0})
            seen_of_it = self.add("ConstantOfShape", [cached], {"value": ir.tensor(np.array([True]))})
        else:
            length = self.add("Squeeze", [self.cache_length, zero])
            slots = self.add("Range", [self.constant(0), length, self.constant(1)])
            seen_of_it = self.add("GreaterOrEqual", [slots, self.add("Unsqueeze", [first, self.constant([2])])])
        seen = self.add("Unsqueeze", [self.add("Concat", [seen_of_it, mask], {"axis": -1}), one])
        visible, hidden = self.constant(0, np.float32), self.constant(np.finfo(np.float32).min, np.float32)
        return _Visible(lengths, longest, self.add("Where", [seen, visible, hidden]))

    def by_row(self, value: ir.Value, heads: int) -> ir.Value:
        """Return `value` [B, H, R, D] as [B, R, H D], from before it was taken apart where that can be found."""
        node = value.producer()
        if node is not None and node.op_type == "RotaryEmbedding":
            inner, cos, sin = node.inputs[:3]
            assert inner is not None
            interleaved = node.attributes["interleaved"].as_int()
            rows = self.by_row(inner, heads)
            return self.add("RotaryEmbedding", [rows, cos, sin], {"interleaved": interleaved, "num_heads": heads})
        if node is not None and _swaps_rows_and_heads(node):
            assert node.inputs[0] is not None
            reshape = node.inputs[0].producer()
            if reshape is not None and reshape.op_type == "Reshape" and _rank(reshape.inputs[0]) == 3:
                assert reshape.inputs[0] is not None
                return reshape.inputs[0]
        swapped = self.add("Transpose", [value], {"perm": [0, 2, 1, 3]})
        return self.add("Reshape", [swapped, self.constant([0, 0, heads * self.dims.head_dim])])

    def replace(self, output: ir.Value, rows: ir.Value) -> None:
        """Put `rows` [B, R, Hq D] in the place of `output` [B, Hq, R, D], or of what it is made into."""
        uses = list(output.uses())
        if len(uses) == 1 and _swaps_rows_and_heads(uses[0].node):
            after = list(uses[0].node.outputs[0].uses())
            if len(after) == 1 and after[0].node.op_type == "Reshape" and _rank(after[0].node.outputs[0]) == 3:
                ir.convenience.replace_all_uses_with(after[0].node.outputs[0], rows)
                return
        shape = self.constant([0, 0, self.dims.query_heads, self.dims.head_dim])
        apart = self.add("Transpose", [self.add("Reshape", [rows, shape])], {"perm": [0, 2, 1, 3]})
        ir.convenience.replace_all_uses_with(output, apart)

    def add(self, operator: str, inputs: list[ir.Value | None], attributes: dict[str, Any] | None = None) -> ir.Value:
        node = ir.node(operator, inputs, attributes or {})
        assert self.before is not None
        self.graph.insert_before(self.before, [node])
        return node.outputs[0]

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
