"""Attention of the graph made for ONNX Runtime on the CPU, over a cache that is written in place.

Each pass takes one of two forms, which is decided in the graph, so that there is one set of weights.

- `com.microsoft.GroupQueryAttention` reads the valid rows of the cache where they are and writes the new ones behind
  them. It takes several rows of one request, or one row of each of several. It is one operator, and the best where
  contexts are short, and for chunks of prompts.
- Two products, with `TensorScatter` before them, read the cache to the capacity that all requests share. The query
  heads that share a key/value head are rows of one product, so that keys and values are read once for all of them. It
  is the form for several rows of several requests, which come one behind the other and are brought to the most that a
  slot has; and for few rows after long contexts, where the other form reads the cache, and arranges it, once for each
  query head. With what a row sees in the same places it computes the same, bit by bit, whatever rows are beside it:
  where no weight is, a product adds exact zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ht_export.graph.domains import CONTRIB
from ht_export.graph.nodes import Nodes, typed
from runtime import bindings
from runtime.bindings import CACHE_LENGTH, GraphDims, key_cache

# Products are taken from so many cached rows on, for so many rows of a request at most, where the room of all requests
# is at most SPARE times what is cached. Below, their nodes take longer than they save.
LONG = 768
FEW = 16
SPARE = (3, 2)


@dataclass(frozen=True)
class _Visible:
    """What the rows that share a tree mask see: for `GroupQueryAttention` lengths [P], the longest of them, and a bias
    [B, 1, R, rows in all]; for products a bias [P, 1, W G, S], where a slot has up to W rows and G query heads share a
    key/value head. To take rows apart, which `rows` [P, W] they are, of all B R; to bring them together again, the
    `places` [B R] of each. What a pass has no use for has no meaning.
    """

    lengths: ir.Value
    longest: ir.Value
    bias: ir.Value
    hidden: ir.Value
    rows: ir.Value
    places: ir.Value


class CacheAttention:
    """Adds the attention of layers to a graph with these `inputs`; what all layers ask of a pass is added once, where
    `nodes` are when the first is.
    """

    def __init__(self, nodes: Nodes, inputs: Mapping[str | None, ir.Value], dims: GraphDims) -> None:
        self.nodes = nodes
        self.inputs = inputs
        self.dims = dims
        self.cache_length = inputs[CACHE_LENGTH]
        self.first_cache = inputs[key_cache(0)]
        self.visible: dict[tuple[ir.Value, ir.Value | None], _Visible] = {}
        self.sizes: dict[str, ir.Value] = {}
        # G, the query heads that share a key/value head.
        self.shared = dims.query_heads // dims.key_value_heads

    def attend(
        self,
        rows: Sequence[ir.Value],
        caches: Sequence[ir.Value],
        mask: ir.Value,
        first: ir.Value | None,
        numbers: Mapping[str, float],
    ) -> list[ir.Value]:
        """Add one layer; return its output [B, R, Hq D], and its keys and values, cached and new.

        `rows` are queries [B, R, Hq D], keys and values [B, R, Hkv D] under `mask` [B, R, R], which see all rows of the
        `caches`, or those from `first` [B, R] on; `numbers` are scale and softcap.
        """
        if not self.sizes:
            self._describe_pass()
        if (mask, first) not in self.visible:
            self.visible[mask, first] = self._describe(mask, first)
        visible = self.visible[mask, first]

        def by_products(nodes: Nodes) -> list[ir.Value]:
            return self._by_products(nodes, rows, caches, visible, numbers)

        def grouped(nodes: Nodes) -> list[ir.Value]:
            return self._grouped(nodes, rows, caches, visible, numbers)

        return self.nodes.choose(self.sizes["by_products"], by_products, grouped)

    def _grouped(
        self,
        nodes: Nodes,
        rows: Sequence[ir.Value],
        caches: Sequence[ir.Value],
        visible: _Visible,
        numbers: Mapping[str, float],
    ) -> list[ir.Value]:
        # It lets rows see later ones where some do: steps that join before those before them. Where none do the
        # attribute is left out, for ONNX Runtime did not always have it.
        in_order = list(self.dims.join_order) == sorted(self.dims.join_order)
        found = nodes.add(
            "GroupQueryAttention",
            [*rows, *caches, visible.lengths, visible.longest, None, None, None, visible.bias],
            {
                "num_heads": self.dims.query_heads,
                "kv_num_heads": self.dims.key_value_heads,
                **numbers,
                **({} if in_order else {"causal": 0}),
            },
            outputs=3,
            domain=CONTRIB,
        )
        return [typed(one, ir.DataType.FLOAT, rank) for one, rank in zip(found, (3, 4, 4), strict=True)]

    def _by_products(
        self,
        nodes: Nodes,
        rows: Sequence[ir.Value],
        caches: Sequence[ir.Value],
        visible: _Visible,
        numbers: Mapping[str, float],
    ) -> list[ir.Value]:
        heads, size = self.dims.query_heads, self.dims.head_dim
        queries, *new = (self._by_slot(nodes, one, visible) for one in rows)
        keys, values = (
            nodes.one("TensorScatter", [cache, one, self.cache_length], {"axis": 2})
            for cache, one in zip(caches, new, strict=True)
        )
        packed = nodes.one("Reshape", [queries, nodes.constant([0, 0, -1, size])])
        softcap = numbers.get("softcap", 0.0)
        alpha = numbers["scale"] / (softcap or 1.0)
        (scores,) = nodes.add("FusedMatMul", [packed, keys], {"alpha": alpha, "transB": 1}, domain=CONTRIB)
        if softcap:
            scores = nodes.one("Mul", [nodes.one("Tanh", [scores]), nodes.constant(softcap, np.float32)])
        weights = nodes.one("Softmax", [nodes.one("Add", [scores, visible.hidden])], {"axis": -1})
        found = nodes.one("MatMul", [weights, values])
        apart = nodes.one("Reshape", [found, nodes.constant([0, 0, -1, self.shared * size])])
        swapped = nodes.one("Transpose", [apart], {"perm": [0, 2, 1, 3]})
        flat = nodes.one("Reshape", [swapped, nodes.constant([-1, heads * size])])
        in_place = nodes.one("Gather", [flat, visible.places], {"axis": 0})
        out = nodes.one("Reshape", [in_place, self.sizes["rows_of_heads"]])
        return [typed(one, ir.DataType.FLOAT, rank) for one, rank in zip((out, keys, values), (3, 4, 4), strict=True)]

    def _by_slot(self, nodes: Nodes, rows: ir.Value, visible: _Visible) -> ir.Value:
        """Return `rows` [B, R, Hkv N] by slot and head, [P, Hkv, W, N]."""
        flat = nodes.one("Flatten", [rows], {"axis": 2})
        gathered = nodes.one("Gather", [flat, visible.rows], {"axis": 0})
        apart = nodes.one("Reshape", [gathered, nodes.constant([0, 0, self.dims.key_value_heads, -1])])
        return nodes.one("Transpose", [apart], {"perm": [0, 2, 1, 3]})

    def _describe_pass(self) -> None:
        """Add what all layers ask of a pass: how many requests and rows there are, and which form it takes."""
        nodes, one, zero = self.nodes, self.nodes.constant([1]), self.nodes.constant([0])
        mask = self.inputs[bindings.TREE_MASK]
        requests = self.sizes["slots"] = nodes.one("Shape", [self.first_cache], {"start": 0, "end": 1})
        capacity = self.sizes["capacity"] = nodes.one("Shape", [self.first_cache], {"start": 2, "end": 3})
        stacked = self.sizes["stacked"] = nodes.one("Shape", [mask], {"start": 0, "end": 1})
        row_size = nodes.constant([-1, self.dims.query_heads * self.dims.head_dim])
        self.sizes["rows_of_heads"] = nodes.one("Concat", [stacked, row_size], {"axis": 0})
        self.sizes["longest"] = nodes.one("ReduceMax", [self.cache_length], {"keepdims": 0})
        rows = nodes.one("Shape", [mask], {"start": 1, "end": 2})
        several = nodes.one("Greater", [requests, one])
        self.sizes["several"] = nodes.one("Squeeze", [several, zero])
        together = nodes.one("And", [several, nodes.one("Greater", [rows, one])])
        used = nodes.one("Mul", [nodes.one("ReduceSum", [self.cache_length]), nodes.constant([SPARE[0]])])
        room = nodes.one("Mul", [nodes.one("Mul", [requests, capacity]), nodes.constant([SPARE[1]])])
        long = nodes.one("GreaterOrEqual", [self.sizes["longest"], nodes.constant([LONG])])
        few = nodes.one("LessOrEqual", [rows, nodes.constant([FEW])])
        full = nodes.one("LessOrEqual", [room, used])
        pays = nodes.one("And", [nodes.one("And", [long, few]), full])
        self.sizes["by_products"] = nodes.one("Squeeze", [nodes.one("Or", [together, pays]), zero])

    def _describe(self, mask: ir.Value, first: ir.Value | None) -> _Visible:
        """Return what rows under `mask` [B, R, R] see: of the cache's valid rows all, or those from `first` [B, R] on,
        and each other as it says.
        """
        nodes, one, zero = self.nodes, self.nodes.constant([1]), self.nodes.constant([0])
        count = nodes.one("Shape", [mask], {"start": 1, "end": 2})
        lengths = nodes.one("Sub", [nodes.one("Add", [self.cache_length, count]), one])
        longest = nodes.one("Add", [self.sizes["longest"], nodes.one("Squeeze", [count, zero])])

        def for_grouped(nodes: Nodes) -> list[ir.Value]:
            (bias,) = nodes.choose(
                self.sizes["several"],
                lambda branch: self._bias_of_one_row_each(branch, mask, first, longest),
                lambda branch: self._bias_of_one(branch, mask, first, count),
            )
            return [typed(bias, ir.DataType.FLOAT, 4), _nothing(nodes, np.float32, 4), *_no_rows(nodes)]

        def for_products(nodes: Nodes) -> list[ir.Value]:
            return [_nothing(nodes, np.float32, 4), *self._bias_of_slots(nodes, mask, first, count)]

        bias, hidden, rows, places = nodes.choose(self.sizes["by_products"], for_products, for_grouped)
        to_int32 = {"to": int(ir.DataType.INT32)}
        lengths, longest = (nodes.one("Cast", [value], to_int32) for value in (lengths, longest))
        return _Visible(lengths, longest, bias, hidden, rows, places)

    def _bias_of_one(self, nodes: Nodes, mask: ir.Value, first: ir.Value | None, count: ir.Value) -> list[ir.Value]:
        one, zero = nodes.constant([1]), nodes.constant([0])
        if first is None:
            cached = nodes.one("Concat", [one, count, self.cache_length], {"axis": 0})
            seen_of_it = nodes.one("ConstantOfShape", [cached], {"value": ir.tensor(np.array([True]))})
        else:
            length = nodes.one("Squeeze", [self.cache_length, zero])
            slots = nodes.one("Range", [nodes.constant(0), length, nodes.constant(1)])
            seen_of_it = nodes.one("GreaterOrEqual", [slots, nodes.one("Unsqueeze", [first, nodes.constant([2])])])
        seen = nodes.one("Unsqueeze", [nodes.one("Concat", [seen_of_it, mask], {"axis": -1}), one])
        return [_bias(nodes, seen)]

    def _bias_of_one_row_each(
        self, nodes: Nodes, mask: ir.Value, first: ir.Value | None, longest: ir.Value
    ) -> list[ir.Value]:
        one, zero = nodes.constant([1]), nodes.constant([0])
        # Of the cache as much is read as is valid for each: only what is too far back is hidden.
        if first is None:
            size = nodes.one(
                "Concat", [nodes.one("Shape", [mask]), nodes.one("Unsqueeze", [longest, zero])], {"axis": 0}
            )
            shape = nodes.one("Gather", [size, nodes.constant([0, 1, 1, 3])])
            zeros = nodes.one("ConstantOfShape", [shape], {"value": ir.tensor(np.zeros(1, np.float32))})
            return [typed(zeros, ir.DataType.FLOAT, 4)]
        slots = nodes.one("Range", [nodes.constant(0), longest, nodes.constant(1)])
        seen = nodes.one("GreaterOrEqual", [slots, nodes.one("Unsqueeze", [first, nodes.constant([2])])])
        return [_bias(nodes, nodes.one("Unsqueeze", [seen, one]))]

    def _bias_of_slots(self, nodes: Nodes, mask: ir.Value, first: ir.Value | None, count: ir.Value) -> list[ir.Value]:
        """Return the bias for products, and the `rows` and `places` of `_Visible`."""
        one, zero = nodes.constant([1]), nodes.constant([0])
        # Rows that join in a later layer have numbers behind those of this one, and are none of it.
        alive = nodes.one("Mul", [self.sizes["stacked"], count])
        slot_rows = self.inputs[bindings.SLOT_ROWS]
        here = nodes.one(
            "And", [nodes.one("Not", [nodes.one("Less", [slot_rows, zero])]), nodes.one("Less", [slot_rows, alive])]
        )
        of_slots = nodes.one("ReduceSum", [nodes.one("Cast", [here], {"to": int(ir.DataType.INT64)}), one])
        width = nodes.one("Reshape", [nodes.one("ReduceMax", [of_slots], {"keepdims": 0}), one])
        found, there = (nodes.one("Slice", [value, zero, width, one]) for value in (slot_rows, here))
        rows = nodes.one("Where", [there, found, zero])
        of_rows = [
            nodes.one("Slice", [self.inputs[name], zero, alive]) for name in (bindings.ROW_SLOTS, bindings.ROW_PLACES)
        ]
        places = nodes.one("Add", [nodes.one("Mul", [of_rows[0], width]), of_rows[1]])
        # The tree mask of each slot [P, W, W]; stacked requests have one each.
        upper = nodes.one("Mul", [nodes.one("Unsqueeze", [rows, nodes.constant([2])]), count])
        pairs = nodes.one("Add", [upper, nodes.one("Unsqueeze", [nodes.one("Mod", [rows, count]), one])])
        trees = nodes.one("Gather", [nodes.one("Reshape", [mask, nodes.constant([-1])]), pairs])
        trees = nodes.one("And", [trees, nodes.one("Unsqueeze", [there, one])])
        # For each row of the cache [P, 1, S] its number among the new ones, negative for those cached before.
        capacity = nodes.one("Squeeze", [self.sizes["capacity"], zero])
        slots = nodes.one("Range", [nodes.constant(0), capacity, nodes.constant(1)])
        row = nodes.one("Sub", [slots, nodes.one("Unsqueeze", [self.cache_length, nodes.constant([1, 2])])])
        cached = nodes.one("Less", [row, zero])
        new = nodes.one("And", [nodes.one("Not", [cached]), nodes.one("Less", [row, width])])
        place = nodes.one("Min", [nodes.one("Max", [row, zero]), nodes.one("Sub", [width, one])])
        shape = nodes.one("Concat", [self.sizes["slots"], width, self.sizes["capacity"]], {"axis": 0})
        tree = nodes.one("GatherElements", [trees, nodes.one("Expand", [place, shape])], {"axis": 2})
        if first is not None:
            from_row = nodes.one("Gather", [nodes.one("Reshape", [first, nodes.constant([-1])]), rows])
            near = nodes.one("GreaterOrEqual", [slots, nodes.one("Unsqueeze", [from_row, nodes.constant([2])])])
            cached = nodes.one("And", [cached, near])
        seen = nodes.one("Or", [cached, nodes.one("And", [new, tree])])
        # Every row once for each of the query heads that are rows of a key/value head.
        by_row = nodes.one("Unsqueeze", [seen, nodes.constant([2])])
        repeated = nodes.one("Expand", [by_row, nodes.constant([1, 1, self.shared, 1])])
        packed = nodes.one("Concat", [nodes.constant([0, 1, -1]), self.sizes["capacity"]], {"axis": 0})
        bias = _bias(nodes, nodes.one("Reshape", [repeated, packed]))
        return [bias, typed(rows, ir.DataType.INT64, 2), typed(places, ir.DataType.INT64, 1)]


def _bias(nodes: Nodes, seen: ir.Value) -> ir.Value:
    """Return a bias [B, 1, R, S] that hides what is not `seen`."""
    visible, hidden = nodes.constant(0, np.float32), nodes.constant(np.finfo(np.float32).min, np.float32)
    return typed(nodes.one("Where", [seen, visible, hidden]), ir.DataType.FLOAT, 4)


def _no_rows(nodes: Nodes) -> list[ir.Value]:
    return [_nothing(nodes, np.int64, rank) for rank in (2, 1)]


def _nothing(nodes: Nodes, dtype: type[np.generic], rank: int) -> ir.Value:
    """Return a value of no meaning, which the other branch of a choice has a use for."""
    value = ir.tensor(np.zeros(1, dtype))
    made = nodes.one("ConstantOfShape", [nodes.constant([1] * rank)], {"value": value})
    return typed(made, value.dtype, rank)
