"""The graph made for ONNX Runtime on the CPU: fewer and larger operators, and a cache that is written in place.

Tree attention becomes `com.microsoft.GroupQueryAttention`, which reads the valid rows of the cache where they are and
writes the new rows behind them. With one buffer bound as past and as present nothing else is copied. It takes several
rows of one request, or one row of each of several. Where several requests have several rows, these come one behind the
other, so that products have no rows to spare; attention alone takes them apart: they are brought to the most that a
slot has, `TensorScatter` writes them and `Attention` reads the cache to the capacity that all share. Which of both a
pass takes is decided in the graph, so that there is one set of weights. Inputs and outputs of the lowered graph are
`GraphDims.lowered_inputs` and `GraphDims.lowered_outputs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ht_export.graph.domains import CONTRIB, DOMAIN
from ht_export.graph.nodes import Nodes, typed
from runtime import bindings
from runtime.bindings import CACHE_LENGTH, GraphDims, key_cache

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


@dataclass(frozen=True)
class _Visible:
    """What the rows that share a tree mask see: for `GroupQueryAttention` lengths [P], the longest of them, and a bias
    [B, 1, R, rows in all]; for `Attention` a mask [P, 1, W G, S], where a slot has up to W rows and G query heads share
    a key/value head. To take rows apart, which `rows` [P, W] they are and the shape [4] of keys and values; to bring
    them together again, the `places` [R] of each. What a pass has no use for has no meaning.
    """

    lengths: ir.Value
    longest: ir.Value
    bias: ir.Value
    mask: ir.Value
    rows: ir.Value
    by_head: ir.Value
    places: ir.Value


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
        self.cache_length = self.inputs[CACHE_LENGTH]
        self.first_cache = self.inputs[key_cache(0)]
        self.visible: dict[tuple[ir.Value, ir.Value | None], _Visible] = {}
        self.before: ir.Node | None = None
        self.constants: dict[tuple[str, str], ir.Value] = {}
        self.nodes = Nodes("lowered", self.insert, self.constant)
        self.sizes: dict[str, ir.Value] = {}
        # G, the query heads that share a key/value head.
        self.shared = dims.query_heads // dims.key_value_heads

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
        if not self.sizes:
            self.describe_pass()
        if (mask, first) not in self.visible:
            self.visible[mask, first] = self.describe(mask, first)
        visible = self.visible[mask, first]
        heads, kv_heads = self.dims.query_heads, self.dims.key_value_heads
        rows = [self.by_row(query, heads), self.by_row(key, kv_heads), self.by_row(value, kv_heads)]
        numbers = {name: attribute.as_float() for name, attribute in attention.attributes.items()}

        def grouped(nodes: Nodes) -> list[ir.Value]:
            found = nodes.add(
                "GroupQueryAttention",
                [*rows, key_cache, value_cache, visible.lengths, visible.longest, None, None, None, visible.bias],
                {"num_heads": heads, "kv_num_heads": kv_heads, **numbers, **self.direction()},
                outputs=3,
                domain=CONTRIB,
            )
            return [typed(one, ir.DataType.FLOAT, rank) for one, rank in zip(found, (3, 4, 4), strict=True)]

        def scattered(nodes: Nodes) -> list[ir.Value]:
            queries, *new = (self.taken_apart(nodes, one, visible) for one in rows)
            keys, values = (
                nodes.one("TensorScatter", [cache, one, self.cache_length], {"axis": 2})
                for cache, one in zip((key_cache, value_cache), new, strict=True)
            )
            # Query heads that share a key/value head are rows of it: the operator arranges keys and values anew for
            # each head that it is given.
            packed = nodes.one("Reshape", [queries, self.constant([0, 0, -1, self.dims.head_dim])])
            found = nodes.one("Attention", [packed, keys, values, visible.mask], numbers)
            apart = nodes.one("Reshape", [found, self.constant([0, 0, -1, self.shared * self.dims.head_dim])])
            swapped = nodes.one("Transpose", [apart], {"perm": [0, 2, 1, 3]})
            one_behind_the_other = nodes.one("Reshape", [swapped, self.constant([1, -1, heads * self.dims.head_dim])])
            flat = nodes.one("Gather", [one_behind_the_other, visible.places], {"axis": 1})
            return [
                typed(one, ir.DataType.FLOAT, rank) for one, rank in zip((flat, keys, values), (3, 4, 4), strict=True)
            ]

        out, keys, values = self.nodes.choose(self.sizes["together"], scattered, grouped)
        self.replace(attention.outputs[0], out)
        return keys, values

    def direction(self) -> dict[str, int]:
        """Return the attribute that lets rows see later ones where some do: steps that join before those before them.

        Where none do it is left out, for ONNX Runtime did not always have it.
        """
        in_order = list(self.dims.join_order) == sorted(self.dims.join_order)
        return {} if in_order else {"causal": 0}

    def describe_pass(self) -> None:
        """Add what all layers ask of a pass: whether several requests have several rows together, and the like."""
        nodes, one = self.nodes, self.constant([1])
        requests = self.sizes["slots"] = nodes.one("Shape", [self.first_cache], {"start": 0, "end": 1})
        rows = nodes.one("Shape", [self.inputs[bindings.TREE_MASK]], {"start": 1, "end": 2})
        several = nodes.one("Greater", [requests, one])
        self.sizes["several"] = nodes.one("Squeeze", [several, self.constant([0])])
        both = nodes.one("And", [several, nodes.one("Greater", [rows, one])])
        self.sizes["together"] = nodes.one("Squeeze", [both, self.constant([0])])
        self.sizes["capacity"] = nodes.one("Shape", [self.first_cache], {"start": 2, "end": 3})
        self.sizes["longest"] = nodes.one("ReduceMax", [self.cache_length], {"keepdims": 0})

    def describe(self, mask: ir.Value, first: ir.Value | None) -> _Visible:
        """Return what rows under `mask` [B, R, R] see: of the cache's valid rows all, or those from `first` [B, R] on,
        and each other as it says.
        """
        nodes, one, zero = self.nodes, self.constant([1]), self.constant([0])
        count = nodes.one("Shape", [mask], {"start": 1, "end": 2})
        lengths = nodes.one("Sub", [nodes.one("Add", [self.cache_length, count]), one])
        longest = nodes.one("Add", [self.sizes["longest"], nodes.one("Squeeze", [count, zero])])
        to_int64 = {"to": int(ir.DataType.INT64)}
        visible, hidden = self.constant(0, np.float32), self.constant(np.finfo(np.float32).min, np.float32)

        def for_one(nodes: Nodes) -> list[ir.Value]:
            if first is None:
                cached = nodes.one("Concat", [one, count, self.cache_length], {"axis": 0})
                seen_of_it = nodes.one("ConstantOfShape", [cached], {"value": ir.tensor(np.array([True]))})
            else:
                length = nodes.one("Squeeze", [self.cache_length, zero])
                slots = nodes.one("Range", [self.constant(0), length, self.constant(1)])
                seen_of_it = nodes.one("GreaterOrEqual", [slots, nodes.one("Unsqueeze", [first, self.constant([2])])])
            seen = nodes.one("Unsqueeze", [nodes.one("Concat", [seen_of_it, mask], {"axis": -1}), one])
            return [typed(nodes.one("Where", [seen, visible, hidden]), ir.DataType.FLOAT, 4)]

        def for_one_row_each(nodes: Nodes) -> list[ir.Value]:
            # Of the cache as much is read as is valid for each: only what is too far back is hidden.
            if first is None:
                each = nodes.one(
                    "Concat", [nodes.one("Shape", [mask]), nodes.one("Unsqueeze", [longest, zero])], {"axis": 0}
                )
                shape = nodes.one("Gather", [each, self.constant([0, 1, 1, 3])])
                zeros = nodes.one("ConstantOfShape", [shape], {"value": ir.tensor(np.zeros(1, np.float32))})
                return [typed(zeros, ir.DataType.FLOAT, 4)]
            slots = nodes.one("Range", [self.constant(0), longest, self.constant(1)])
            seen = nodes.one("GreaterOrEqual", [slots, nodes.one("Unsqueeze", [first, self.constant([2])])])
            bias = nodes.one("Where", [nodes.one("Unsqueeze", [seen, one]), visible, hidden])
            return [typed(bias, ir.DataType.FLOAT, 4)]

        def for_several(nodes: Nodes) -> list[ir.Value]:
            # Rows that join in a later layer have numbers from `count` on, and are none of this one.
            slot_rows = self.inputs[bindings.SLOT_ROWS]
            here = nodes.one(
                "And", [nodes.one("Not", [nodes.one("Less", [slot_rows, zero])]), nodes.one("Less", [slot_rows, count])]
            )
            of_slots = nodes.one("ReduceSum", [nodes.one("Cast", [here], to_int64), one])
            width = nodes.one("Reshape", [nodes.one("ReduceMax", [of_slots], {"keepdims": 0}), one])
            found, there = (nodes.one("Slice", [value, zero, width, one]) for value in (slot_rows, here))
            rows = nodes.one("Where", [there, found, zero])
            by_head = nodes.one(
                "Concat", [self.sizes["slots"], width, self.constant([self.dims.key_value_heads, -1])], {"axis": 0}
            )
            alive = [
                nodes.one("Slice", [self.inputs[name], zero, count])
                for name in (bindings.ROW_SLOTS, bindings.ROW_PLACES)
            ]
            places = nodes.one("Add", [nodes.one("Mul", [alive[0], width]), alive[1]])
            # The tree mask of each slot [P, W, W].
            upper = nodes.one("Mul", [nodes.one("Unsqueeze", [rows, self.constant([2])]), count])
            pairs = nodes.one("Add", [upper, nodes.one("Unsqueeze", [rows, one])])
            trees = nodes.one("Gather", [nodes.one("Reshape", [mask, self.constant([-1])]), pairs])
            trees = nodes.one("And", [trees, nodes.one("Unsqueeze", [there, one])])
            # For each row of the cache [P, 1, S] its number among the new ones, negative for those cached before.
            capacity = nodes.one("Squeeze", [self.sizes["capacity"], zero])
            slots = nodes.one("Range", [self.constant(0), capacity, self.constant(1)])
            row = nodes.one("Sub", [slots, nodes.one("Unsqueeze", [self.cache_length, self.constant([1, 2])])])
            cached = nodes.one("Less", [row, zero])
            new = nodes.one("And", [nodes.one("Not", [cached]), nodes.one("Less", [row, width])])
            place = nodes.one("Min", [nodes.one("Max", [row, zero]), nodes.one("Sub", [width, one])])
            shape = nodes.one("Concat", [self.sizes["slots"], width, self.sizes["capacity"]], {"axis": 0})
            tree = nodes.one("GatherElements", [trees, nodes.one("Expand", [place, shape])], {"axis": 2})
            if first is not None:
                of_rows = nodes.one("Gather", [nodes.one("Reshape", [first, self.constant([-1])]), rows])
                near = nodes.one("GreaterOrEqual", [slots, nodes.one("Unsqueeze", [of_rows, self.constant([2])])])
                cached = nodes.one("And", [cached, near])
            seen = nodes.one("Or", [cached, nodes.one("And", [new, tree])])
            # Every row once for each of the query heads that are rows of a key/value head.
            by_row = nodes.one("Unsqueeze", [seen, self.constant([2])])
            repeated = nodes.one("Expand", [by_row, self.constant([1, 1, self.shared, 1])])
            packed = self.constant([0, 1, -1]), self.sizes["capacity"]
            mask_of_heads = nodes.one("Reshape", [repeated, nodes.one("Concat", packed, {"axis": 0})])
            bias = nodes.one("Where", [mask_of_heads, visible, hidden])
            return [
                typed(bias, ir.DataType.FLOAT, 4),
                *(typed(value, ir.DataType.INT64, rank) for value, rank in ((rows, 2), (by_head, 1), (places, 1))),
            ]

        def no_bias(nodes: Nodes) -> list[ir.Value]:
            shape = self.constant([1, 1, 1, 1])
            nothing = nodes.one("ConstantOfShape", [shape], {"value": ir.tensor(np.zeros(1, np.float32))})
            return [typed(nothing, ir.DataType.FLOAT, 4)]

        def no_rows(nodes: Nodes) -> list[ir.Value]:
            found = []
            for rank in (2, 1, 1):
                shape, nothing = self.constant([1] * rank), ir.tensor(np.zeros(1, np.int64))
                found.append(typed(nodes.one("ConstantOfShape", [shape], {"value": nothing}), ir.DataType.INT64, rank))
            return found

        def for_rows(nodes: Nodes) -> list[ir.Value]:
            (bias,) = nodes.choose(self.sizes["several"], for_one_row_each, for_one)
            return [typed(bias, ir.DataType.FLOAT, 4), *no_bias(nodes), *no_rows(nodes)]

        bias, seen, rows, by_head, places = nodes.choose(
            self.sizes["together"], lambda branch: [*no_bias(branch), *for_several(branch)], for_rows
        )
        to_int32 = {"to": int(ir.DataType.INT32)}
        lengths, longest = (nodes.one("Cast", [value], to_int32) for value in (lengths, longest))
        return _Visible(lengths, longest, bias, seen, rows, by_head, places)

    def taken_apart(self, nodes: Nodes, rows: ir.Value, visible: _Visible) -> ir.Value:
        """Return `rows` [1, R, Hkv N] by slot and head, [P, Hkv, W, N]."""
        by_slot = nodes.one("Reshape", [nodes.one("Gather", [rows, visible.rows], {"axis": 1}), visible.by_head])
        return nodes.one("Transpose", [by_slot], {"perm": [0, 2, 1, 3]})

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
