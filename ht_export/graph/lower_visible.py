"""What the rows of a pass see of the cache and of each other, as each form of `lower_attention` asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ht_export.graph.nodes import Nodes, typed
from runtime import bindings
from runtime.bindings import CACHE_LENGTH, GraphDims, key_cache

# Products are taken from so many cached rows on, for so many rows of a request at most, where the room of all requests
# is at most SPARE times what is cached: they read it all. They save nothing where query heads share no key/value head.
LONG = 768
FEW = 48
SPARE = (3, 2)


@dataclass(frozen=True)
class Sizes:
    """What all layers ask of a pass: the slots P and their capacity S, both [1]; whether there are several, whether
    `GroupQueryAttention` takes the pass and, where it does not, whether the rows are trees of several; the longest
    context, and the shortest [1].
    """

    slots: ir.Value
    capacity: ir.Value
    several: ir.Value
    grouped: ir.Value
    together: ir.Value
    longest: ir.Value
    shortest: ir.Value


@dataclass(frozen=True)
class Visible:
    """What the rows that share a tree mask see. For `GroupQueryAttention` lengths [P], the longest of them, and a bias
    [B, 1, R, rows in all].

    For trees of several a bias [P, 1, W G, S], where a slot has up to W rows and G query heads share a key/value head;
    to take rows apart, which `rows` [P, W] they are and the shape [4] of keys and values; to bring them together
    again, the `places` [R] of each.

    For products a bias [P, 1, R G, S - start] of what is behind the first `start` [1] rows of the cache, which are
    seen by all. What a pass has no use for has no meaning.
    """

    lengths: ir.Value
    longest: ir.Value
    bias: ir.Value
    hidden: ir.Value
    rows: ir.Value
    by_head: ir.Value
    places: ir.Value
    start: ir.Value


def sizes_of(nodes: Nodes, inputs: Mapping[str | None, ir.Value], dims: GraphDims) -> Sizes:
    """Add what all layers ask of a pass to a graph with these `inputs`."""
    one, zero = nodes.constant([1]), nodes.constant([0])
    cached, first_cache, mask = inputs[CACHE_LENGTH], inputs[key_cache(0)], inputs[bindings.TREE_MASK]
    slots = nodes.one("Shape", [first_cache], {"start": 0, "end": 1})
    capacity = nodes.one("Shape", [first_cache], {"start": 2, "end": 3})
    rows = nodes.one("Shape", [mask], {"start": 1, "end": 2})
    several = nodes.one("Greater", [slots, one])
    together = nodes.one("And", [several, nodes.one("Greater", [rows, one])])
    longest = nodes.one("ReduceMax", [cached], {"keepdims": 0})
    used = nodes.one("Mul", [nodes.one("ReduceSum", [cached]), nodes.constant([SPARE[0]])])
    room = nodes.one("Mul", [nodes.one("Mul", [slots, capacity]), nodes.constant([SPARE[1]])])
    short = nodes.one("Less", [longest, nodes.constant([LONG])])
    many = nodes.one("Greater", [rows, nodes.constant([FEW])])
    mostly_spare = nodes.one("Greater", [room, used])
    best = nodes.one("Or", [nodes.one("Or", [short, many]), mostly_spare])
    grouped = nodes.one("Not", [together])
    if dims.query_heads > dims.key_value_heads:
        grouped = nodes.one("And", [grouped, best])
    several, grouped, together = (nodes.one("Squeeze", [value, zero]) for value in (several, grouped, together))
    return Sizes(slots, capacity, several, grouped, together, longest, nodes.one("ReduceMin", [cached]))


@dataclass(frozen=True)
class Views:
    """Adds what rows see to a graph with these `inputs`, for passes of these `sizes`."""

    nodes: Nodes
    inputs: Mapping[str | None, ir.Value]
    dims: GraphDims
    sizes: Sizes

    def of(self, mask: ir.Value, first: ir.Value | None) -> Visible:
        """Return what rows under `mask` [B, R, R] see: of the cache's valid rows all, or those from `first` [B, R] on,
        and each other as it says.
        """
        nodes, one, zero = self.nodes, self.nodes.constant([1]), self.nodes.constant([0])
        cached = self.inputs[CACHE_LENGTH]
        count = nodes.one("Shape", [mask], {"start": 1, "end": 2})
        lengths = nodes.one("Sub", [nodes.one("Add", [cached, count]), one])
        longest = nodes.one("Add", [self.sizes.longest, nodes.one("Squeeze", [count, zero])])
        # A row of a window does not see all that is cached.
        start = self.sizes.shortest if first is None else zero

        def for_grouped(nodes: Nodes) -> list[ir.Value]:
            (bias,) = nodes.choose(
                self.sizes.several,
                lambda branch: [self._of_one_row_each(branch, mask, first, longest)],
                lambda branch: [self._of_one(branch, mask, first, count)],
            )
            return [bias, _nothing(nodes, np.float32, 4), *_no_rows(nodes)]

        def for_products(nodes: Nodes) -> list[ir.Value]:
            hidden = self._behind(nodes, mask, first, start)
            return [_nothing(nodes, np.float32, 4), hidden, *_no_rows(nodes)]

        def for_trees(nodes: Nodes) -> list[ir.Value]:
            return [_nothing(nodes, np.float32, 4), *self._of_trees(nodes, mask, first, count)]

        bias, hidden, rows, by_head, places = nodes.choose(
            self.sizes.grouped,
            for_grouped,
            lambda branch: branch.choose(self.sizes.together, for_trees, for_products),
        )
        to_int32 = {"to": int(ir.DataType.INT32)}
        lengths, longest = (nodes.one("Cast", [value], to_int32) for value in (lengths, longest))
        return Visible(lengths, longest, bias, hidden, rows, by_head, places, start)

    def _of_one(self, nodes: Nodes, mask: ir.Value, first: ir.Value | None, count: ir.Value) -> ir.Value:
        one, zero = nodes.constant([1]), nodes.constant([0])
        cached = self.inputs[CACHE_LENGTH]
        if first is None:
            shape = nodes.one("Concat", [one, count, cached], {"axis": 0})
            seen_of_it = nodes.one("ConstantOfShape", [shape], {"value": ir.tensor(np.array([True]))})
        else:
            slots = nodes.one("Range", [nodes.constant(0), nodes.one("Squeeze", [cached, zero]), nodes.constant(1)])
            seen_of_it = nodes.one("GreaterOrEqual", [slots, nodes.one("Unsqueeze", [first, nodes.constant([2])])])
        return _bias(nodes, nodes.one("Unsqueeze", [nodes.one("Concat", [seen_of_it, mask], {"axis": -1}), one]))

    def _of_one_row_each(self, nodes: Nodes, mask: ir.Value, first: ir.Value | None, longest: ir.Value) -> ir.Value:
        one, zero = nodes.constant([1]), nodes.constant([0])
        # Of the cache as much is read as is valid for each: only what is too far back is hidden.
        if first is None:
            size = nodes.one(
                "Concat", [nodes.one("Shape", [mask]), nodes.one("Unsqueeze", [longest, zero])], {"axis": 0}
            )
            shape = nodes.one("Gather", [size, nodes.constant([0, 1, 1, 3])])
            zeros = nodes.one("ConstantOfShape", [shape], {"value": ir.tensor(np.zeros(1, np.float32))})
            return typed(zeros, ir.DataType.FLOAT, 4)
        slots = nodes.one("Range", [nodes.constant(0), longest, nodes.constant(1)])
        seen = nodes.one("GreaterOrEqual", [slots, nodes.one("Unsqueeze", [first, nodes.constant([2])])])
        return _bias(nodes, nodes.one("Unsqueeze", [seen, one]))

    def _behind(self, nodes: Nodes, mask: ir.Value, first: ir.Value | None, start: ir.Value) -> ir.Value:
        """Return the bias for products: rows are stacked, so that B = P."""
        room = nodes.one("Sub", [self.sizes.capacity, start])
        return self._for_query_heads(nodes, self._seen(nodes, mask, first, start), room)

    def _of_trees(self, nodes: Nodes, mask: ir.Value, first: ir.Value | None, count: ir.Value) -> list[ir.Value]:
        """Return the bias, the `rows`, their shape `by_head` and their `places` for trees of several."""
        one, zero = nodes.constant([1]), nodes.constant([0])
        # Rows that join in a later layer have numbers from `count` on, and are none of this one.
        slot_rows = self.inputs[bindings.SLOT_ROWS]
        here = nodes.one(
            "And", [nodes.one("Not", [nodes.one("Less", [slot_rows, zero])]), nodes.one("Less", [slot_rows, count])]
        )
        of_slots = nodes.one("ReduceSum", [nodes.one("Cast", [here], {"to": int(ir.DataType.INT64)}), one])
        width = nodes.one("Reshape", [nodes.one("ReduceMax", [of_slots], {"keepdims": 0}), one])
        found, there = (nodes.one("Slice", [value, zero, width, one]) for value in (slot_rows, here))
        rows = nodes.one("Where", [there, found, zero])
        by_head = nodes.one(
            "Concat", [self.sizes.slots, width, nodes.constant([self.dims.key_value_heads, -1])], {"axis": 0}
        )
        alive = [
            nodes.one("Slice", [self.inputs[name], zero, count]) for name in (bindings.ROW_SLOTS, bindings.ROW_PLACES)
        ]
        places = nodes.one("Add", [nodes.one("Mul", [alive[0], width]), alive[1]])
        # The tree mask of each slot [P, W, W].
        upper = nodes.one("Mul", [nodes.one("Unsqueeze", [rows, nodes.constant([2])]), count])
        pairs = nodes.one("Add", [upper, nodes.one("Unsqueeze", [rows, one])])
        trees = nodes.one("Gather", [nodes.one("Reshape", [mask, nodes.constant([-1])]), pairs])
        trees = nodes.one("And", [trees, nodes.one("Unsqueeze", [there, one])])
        if first is not None:
            first = nodes.one("Gather", [nodes.one("Reshape", [first, nodes.constant([-1])]), rows])
        bias = self._for_query_heads(nodes, self._seen(nodes, trees, first, zero), self.sizes.capacity)
        return [
            bias,
            *(typed(value, ir.DataType.INT64, rank) for value, rank in ((rows, 2), (by_head, 1), (places, 1))),
        ]

    def _seen(self, nodes: Nodes, trees: ir.Value, first: ir.Value | None, start: ir.Value) -> ir.Value:
        """Return what rows of slots under `trees` [P, W, W] see of the cache from `start` [1] on, [P, W, S - start]."""
        one, zero = nodes.constant([1]), nodes.constant([0])
        begin, end = (nodes.one("Squeeze", [value, zero]) for value in (start, self.sizes.capacity))
        slots = nodes.one("Range", [begin, end, nodes.constant(1)])
        # For each row of the cache [P, 1, S - start] its number among the new ones, negative for those cached before.
        row = nodes.one("Sub", [slots, nodes.one("Unsqueeze", [self.inputs[CACHE_LENGTH], nodes.constant([1, 2])])])
        width = nodes.one("Shape", [trees], {"start": 1, "end": 2})
        cached = nodes.one("Less", [row, zero])
        new = nodes.one("And", [nodes.one("Not", [cached]), nodes.one("Less", [row, width])])
        place = nodes.one("Min", [nodes.one("Max", [row, zero]), nodes.one("Sub", [width, one])])
        room = nodes.one("Sub", [self.sizes.capacity, start])
        shape = nodes.one("Concat", [self.sizes.slots, width, room], {"axis": 0})
        tree = nodes.one("GatherElements", [trees, nodes.one("Expand", [place, shape])], {"axis": 2})
        if first is not None:
            near = nodes.one("GreaterOrEqual", [slots, nodes.one("Unsqueeze", [first, nodes.constant([2])])])
            cached = nodes.one("And", [cached, near])
        return nodes.one("Or", [cached, nodes.one("And", [new, tree])])

    def _for_query_heads(self, nodes: Nodes, seen: ir.Value, size: ir.Value) -> ir.Value:
        """Return the bias [P, 1, W G, size] of what is `seen` [P, W, size]: each row once for each of the query heads
        that are rows of a key/value head.
        """
        shared = self.dims.query_heads // self.dims.key_value_heads
        by_row = nodes.one("Unsqueeze", [seen, nodes.constant([2])])
        repeated = nodes.one("Expand", [by_row, nodes.constant([1, 1, shared, 1])])
        packed = nodes.one("Concat", [nodes.constant([0, 1, -1]), size], {"axis": 0})
        return _bias(nodes, nodes.one("Reshape", [repeated, packed]))


def _bias(nodes: Nodes, seen: ir.Value) -> ir.Value:
    """Return a bias that hides what is not `seen`, of four axes."""
    visible, hidden = nodes.constant(0, np.float32), nodes.constant(np.finfo(np.float32).min, np.float32)
    return typed(nodes.one("Where", [seen, visible, hidden]), ir.DataType.FLOAT, 4)


def _no_rows(nodes: Nodes) -> list[ir.Value]:
    return [_nothing(nodes, np.int64, rank) for rank in (2, 1, 1)]


def _nothing(nodes: Nodes, dtype: type[np.generic], rank: int) -> ir.Value:
    """Return a value of no meaning, which the other branch of a choice has a use for."""
    value = ir.tensor(np.zeros(1, dtype))
    made = nodes.one("ConstantOfShape", [nodes.constant([1] * rank)], {"value": value})
    return typed(made, value.dtype, rank)
