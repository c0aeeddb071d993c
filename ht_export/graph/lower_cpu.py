"""The graph made for ONNX Runtime on the CPU: fewer and larger operators, and a cache that is written in place.

Tree attention becomes `com.microsoft.GroupQueryAttention`, which reads the valid rows of the cache where they are and
writes the new rows behind them. With one buffer bound as past and as present nothing else is copied. It takes several
rows of one request, or one row of each of several; where several requests have several rows, `TensorScatter` writes
them and `Attention` reads the cache to the capacity that all share. Which of both a pass takes is decided in the graph,
so that there is one set of weights. The lowered graph has the inputs of the portable one, and the outputs
`GraphDims.lowered_outputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ht_export.graph.domains import CONTRIB, DOMAIN
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
    model.metadata_props[bindings.REQUESTS] = bindings.ANY
    RemoveUnusedNodesPass()(model)
    _fuse_residuals(model.graph)
    RemoveUnusedNodesPass()(model)


@dataclass(frozen=True)
class _Visible:
    """What the rows that share a tree mask see: for `GroupQueryAttention` lengths [B], the longest of them, and a bias
    [B, 1, R, rows in all]; for `Attention` a mask [B, 1, R G, S], where G query heads share a key/value head. Of both
    the one that a pass has no use for has no meaning.
    """

    lengths: ir.Value
    longest: ir.Value
    bias: ir.Value
    mask: ir.Value


class _Nodes:
    """Appends nodes: before another one of a graph, or to a list that becomes a branch of an `If`."""

    def __init__(self, name: str, append: Callable[[ir.Node], None], constant: Callable[..., ir.Value]) -> None:
        self._name = name
        self._append = append
        self.constant = constant
        self._count = 0

    def add(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        outputs: int = 1,
        domain: str = "",
    ) -> list[ir.Value]:
        """Append a node; return its outputs, named as no others in the graph or its branches are."""
        self._count += 1
        names = [f"{self._name}_{self._count}_{index}" for index in range(outputs)]
        node = ir.node(operator, inputs, attributes or {}, domain=domain, outputs=[ir.val(name) for name in names])
        self._append(node)
        return list(node.outputs)

    def one(
        self, operator: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any] | None = None
    ) -> ir.Value:
        """Append a node with one output; return that."""
        return self.add(operator, inputs, attributes)[0]

    def choose(
        self, condition: ir.Value, yes: Callable[[_Nodes], list[ir.Value]], no: Callable[[_Nodes], list[ir.Value]]
    ) -> list[ir.Value]:
        """Append an `If`: what `yes` or `no` returns, by `condition`; return its outputs."""
        self._count += 1
        branches = {}
        kinds: list[ir.Value] = []
        for name, make in (("then_branch", yes), ("else_branch", no)):
            nodes: list[ir.Node] = []
            kinds = make(_Nodes(f"{self._name}_{self._count}_{name[:4]}", nodes.append, self.constant))
            branches[name] = ir.Graph([], kinds, nodes=nodes, name=f"{self._name}_{self._count}_{name}")
        self._count -= 1
        found = self.add("If", [condition], branches, outputs=len(kinds))
        for value, kind in zip(found, kinds, strict=True):
            value.type = kind.type
        return found


def _typed(value: ir.Value, dtype: ir.DataType, rank: int) -> ir.Value:
    """State the type and the rank of an output of a branch."""
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape([None] * rank)
    return value


class _Lowering:
    def __init__(self, graph: ir.Graph, dims: GraphDims) -> None:
        self.graph = graph
        self.dims = dims
        inputs = {value.name: value for value in graph.inputs}
        self.cache_length = inputs[CACHE_LENGTH]
        self.first_cache = inputs[key_cache(0)]
        self.visible: dict[tuple[ir.Value, ir.Value | None], _Visible] = {}
        self.before: ir.Node | None = None
        self.constants: dict[tuple[str, str], ir.Value] = {}
        self.nodes = _Nodes("lowered", self.insert, self.constant)
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
            self.describe_pass(mask)
        if (mask, first) not in self.visible:
            self.visible[mask, first] = self.describe(mask, first)
        visible = self.visible[mask, first]
        heads, kv_heads = self.dims.query_heads, self.dims.key_value_heads
        rows = [self.by_row(query, heads), self.by_row(key, kv_heads), self.by_row(value, kv_heads)]
        numbers = {name: attribute.as_float() for name, attribute in attention.attributes.items()}

        def grouped(nodes: _Nodes) -> list[ir.Value]:
            found = nodes.add(
                "GroupQueryAttention",
                [*rows, key_cache, value_cache, visible.lengths, visible.longest, None, None, None, visible.bias],
                {"num_heads": heads, "kv_num_heads": kv_heads, **numbers, **self.direction()},
                outputs=3,
                domain=CONTRIB,
            )
            return [_typed(one, ir.DataType.FLOAT, rank) for one, rank in zip(found, (3, 4, 4), strict=True)]

        def scattered(nodes: _Nodes) -> list[ir.Value]:
            queries, *new = (self.by_head(nodes, one, kv_heads) for one in rows)
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
            flat = nodes.one("Reshape", [swapped, self.constant([0, 0, heads * self.dims.head_dim])])
            return [
                _typed(one, ir.DataType.FLOAT, rank) for one, rank in zip((flat, keys, values), (3, 4, 4), strict=True)
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

    def describe_pass(self, mask: ir.Value) -> None:
        """Add what all layers ask of a pass: whether several requests have several rows together, and the like."""
        nodes, one = self.nodes, self.constant([1])
        requests = nodes.one("Shape", [mask], {"start": 0, "end": 1})
        rows = nodes.one("Shape", [self.tree_mask()], {"start": 1, "end": 2})
        several = nodes.one("Greater", [requests, one])
        self.sizes["several"] = nodes.one("Squeeze", [several, self.constant([0])])
        both = nodes.one("And", [several, nodes.one("Greater", [rows, one])])
        self.sizes["together"] = nodes.one("Squeeze", [both, self.constant([0])])
        self.sizes["capacity"] = nodes.one("Shape", [self.first_cache], {"start": 2, "end": 3})
        self.sizes["longest"] = nodes.one("ReduceMax", [self.cache_length], {"keepdims": 0})

    def tree_mask(self) -> ir.Value:
        """Return the input of that name."""
        return next(value for value in self.graph.inputs if value.name == bindings.TREE_MASK)

    def describe(self, mask: ir.Value, first: ir.Value | None) -> _Visible:
        """Return what rows under `mask` [B, R, R] see: of the cache's valid rows all, or those from `first` [B, R] on,
        and each other as it says.
        """
        nodes, one, zero = self.nodes, self.constant([1]), self.constant([0])
        count = nodes.one("Shape", [mask], {"start": 1, "end": 2})
        lengths = nodes.one("Sub", [nodes.one("Add", [self.cache_length, count]), one])
        longest = nodes.one("Add", [self.sizes["longest"], nodes.one("Squeeze", [count, zero])])
        visible, hidden = self.constant(0, np.float32), self.constant(np.finfo(np.float32).min, np.float32)

        def for_one(nodes: _Nodes) -> list[ir.Value]:
            if first is None:
                cached = nodes.one("Concat", [one, count, self.cache_length], {"axis": 0})
                seen_of_it = nodes.one("ConstantOfShape", [cached], {"value": ir.tensor(np.array([True]))})
            else:
                length = nodes.one("Squeeze", [self.cache_length, zero])
                slots = nodes.one("Range", [self.constant(0), length, self.constant(1)])
                seen_of_it = nodes.one("GreaterOrEqual", [slots, nodes.one("Unsqueeze", [first, self.constant([2])])])
            seen = nodes.one("Unsqueeze", [nodes.one("Concat", [seen_of_it, mask], {"axis": -1}), one])
            return [_typed(nodes.one("Where", [seen, visible, hidden]), ir.DataType.FLOAT, 4)]

        def for_one_row_each(nodes: _Nodes) -> list[ir.Value]:
            # Of the cache as much is read as is valid for each: only what is too far back is hidden.
            if first is None:
                each = nodes.one(
                    "Concat", [nodes.one("Shape", [mask]), nodes.one("Unsqueeze", [longest, zero])], {"axis": 0}
                )
                shape = nodes.one("Gather", [each, self.constant([0, 1, 1, 3])])
                zeros = nodes.one("ConstantOfShape", [shape], {"value": ir.tensor(np.zeros(1, np.float32))})
                return [_typed(zeros, ir.DataType.FLOAT, 4)]
            slots = nodes.one("Range", [self.constant(0), longest, self.constant(1)])
            seen = nodes.one("GreaterOrEqual", [slots, nodes.one("Unsqueeze", [first, self.constant([2])])])
            bias = nodes.one("Where", [nodes.one("Unsqueeze", [seen, one]), visible, hidden])
            return [_typed(bias, ir.DataType.FLOAT, 4)]

        def for_several(nodes: _Nodes) -> list[ir.Value]:
            capacity = nodes.one("Squeeze", [self.sizes["capacity"], zero])
            slots = nodes.one("Range", [self.constant(0), capacity, self.constant(1)])
            # Of each slot [B, 1, S] the row that is written there, negative for those cached before.
            row = nodes.one("Sub", [slots, nodes.one("Unsqueeze", [self.cache_length, self.constant([1, 2])])])
            cached = nodes.one("Less", [row, zero])
            new = nodes.one("And", [nodes.one("Not", [cached]), nodes.one("Less", [row, count])])
            last = nodes.one("Sub", [count, one])
            place = nodes.one("Min", [nodes.one("Max", [row, zero]), last])
            requests_and_rows = nodes.one("Shape", [mask], {"start": 0, "end": 2})
            shape = nodes.one("Concat", [requests_and_rows, self.sizes["capacity"]], {"axis": 0})
            tree = nodes.one("GatherElements", [mask, nodes.one("Expand", [place, shape])], {"axis": 2})
            if first is not None:
                near = nodes.one("GreaterOrEqual", [slots, nodes.one("Unsqueeze", [first, self.constant([2])])])
                cached = nodes.one("And", [cached, near])
            seen = nodes.one("Or", [cached, nodes.one("And", [new, tree])])
            # Every row once for each of the query heads that are rows of a key/value head.
            by_row = nodes.one("Unsqueeze", [seen, self.constant([2])])
            repeated = nodes.one("Expand", [by_row, self.constant([1, 1, self.shared, 1])])
            packed = self.constant([0, 1, -1]), self.sizes["capacity"]
            mask_of_heads = nodes.one("Reshape", [repeated, nodes.one("Concat", packed, {"axis": 0})])
            return [_typed(nodes.one("Where", [mask_of_heads, visible, hidden]), ir.DataType.FLOAT, 4)]

        def no_bias(nodes: _Nodes) -> list[ir.Value]:
            shape = self.constant([1, 1, 1, 1])
            nothing = nodes.one("ConstantOfShape", [shape], {"value": ir.tensor(np.zeros(1, np.float32))})
            return [_typed(nothing, ir.DataType.FLOAT, 4)]

        def for_rows(nodes: _Nodes) -> list[ir.Value]:
            (bias,) = nodes.choose(self.sizes["several"], for_one_row_each, for_one)
            return [_typed(bias, ir.DataType.FLOAT, 4), *no_bias(nodes)]

        bias, seen = nodes.choose(
            self.sizes["together"], lambda branch: [*no_bias(branch), *for_several(branch)], for_rows
        )
        to_int32 = {"to": int(ir.DataType.INT32)}
        return _Visible(nodes.one("Cast", [lengths], to_int32), nodes.one("Cast", [longest], to_int32), bias, seen)

    def by_head(self, nodes: _Nodes, rows: ir.Value, heads: int) -> ir.Value:
        """Return `rows` [B, R, H N] as [B, H, R, N]."""
        apart = nodes.one("Reshape", [rows, self.constant([0, 0, heads, -1])])
        return nodes.one("Transpose", [apart], {"perm": [0, 2, 1, 3]})

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
