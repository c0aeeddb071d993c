"""Attention of the graph made for ONNX Runtime on the CPU, over a cache that is written in place.

Each pass takes one of three forms, which is decided in the graph, so that there is one set of weights.

- `com.microsoft.GroupQueryAttention` reads the valid rows of the cache where they are and writes the new ones behind
  them. It takes any rows of one request, or one row of each of several. It is one operator, and the best where contexts
  are short, and for chunks of prompts.
- Two products with a softmax between them, for few rows of one request, or one row of each of several, after long
  contexts. The form above reads the cache, and arranges it, once for each query head; here the query heads that share a
  key/value head are rows of one product. They read the cache to its capacity. With what a row sees in the same places
  it gets the same, bit by bit, whatever rows are beside it: where no weight is, a product adds exact zeros.
- `Attention` for several rows of several requests, which come one behind the other, so that products of weights have no
  rows to spare. Attention alone takes them apart: they are brought to the most that a slot has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ht_export.graph.domains import CONTRIB
from ht_export.graph.lower_visible import Sizes, Views, Visible, sizes_of
from ht_export.graph.nodes import Nodes, typed
from runtime.bindings import CACHE_LENGTH, GraphDims


class CacheAttention:
    """Adds the attention of layers to a graph with these `inputs`; what all layers ask of a pass is added once, where
    `nodes` are when the first is.
    """

    def __init__(self, nodes: Nodes, inputs: Mapping[str | None, ir.Value], dims: GraphDims) -> None:
        self.nodes = nodes
        self.inputs = inputs
        self.dims = dims
        self.cache_length = inputs[CACHE_LENGTH]
        self.sizes: Sizes | None = None
        self.visible: dict[tuple[ir.Value, ir.Value | None], Visible] = {}
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
        sizes = self.sizes = self.sizes or sizes_of(self.nodes, self.inputs, self.dims)
        if (mask, first) not in self.visible:
            self.visible[mask, first] = Views(self.nodes, self.inputs, self.dims, sizes).of(mask, first)
        visible = self.visible[mask, first]

        def grouped(nodes: Nodes) -> list[ir.Value]:
            return self._grouped(nodes, [*rows, *caches], visible, numbers)

        def by_products(nodes: Nodes) -> list[ir.Value]:
            return self._by_products(nodes, rows, caches, visible, sizes, first is None, numbers)

        def of_trees(nodes: Nodes) -> list[ir.Value]:
            return self._of_trees(nodes, rows, caches, visible, numbers)

        return self.nodes.choose(
            sizes.grouped, grouped, lambda branch: branch.choose(sizes.together, of_trees, by_products)
        )

    def _grouped(
        self, nodes: Nodes, inputs: Sequence[ir.Value], visible: Visible, numbers: Mapping[str, float]
    ) -> list[ir.Value]:
        # It lets rows see later ones where some do: steps that join before those before them. Where none do the
        # attribute is left out, for ONNX Runtime did not always have it.
        in_order = list(self.dims.join_order) == sorted(self.dims.join_order)
        found = nodes.add(
            "GroupQueryAttention",
            [*inputs, visible.lengths, visible.longest, None, None, None, visible.bias],
            {
                "num_heads": self.dims.query_heads,
                "kv_num_heads": self.dims.key_value_heads,
                **numbers,
                **({} if in_order else {"causal": 0}),
            },
            outputs=3,
            domain=CONTRIB,
        )
        return _attended(*found)

    def _by_products(
        self,
        nodes: Nodes,
        rows: Sequence[ir.Value],
        caches: Sequence[ir.Value],
        visible: Visible,
        sizes: Sizes,
        sees_all: bool,
        numbers: Mapping[str, float],
    ) -> list[ir.Value]:
        queries, keys, values = self._written(nodes, [self._by_head(nodes, one) for one in rows], caches)
        softcap = numbers.get("softcap", 0.0)
        alpha = numbers["scale"] / (softcap or 1.0)
        (scores,) = nodes.add("FusedMatMul", [queries, keys], {"alpha": alpha, "transB": 1}, domain=CONTRIB)
        if softcap:
            scores = nodes.one("Mul", [nodes.one("Tanh", [scores]), nodes.constant(softcap, np.float32)])
        self._shape_of_scores(scores)
        if sees_all:
            # Only what is behind the rows that all see is brought in, and written where it was.
            ends = [visible.start, sizes.capacity, nodes.constant([3])]
            behind = nodes.one("Add", [nodes.one("Slice", [scores, *ends]), visible.hidden])
            starts = nodes.one("Expand", [visible.start, sizes.slots])
            scores = nodes.one("TensorScatter", [scores, behind, starts], {"axis": 3})
        else:
            scores = nodes.one("Add", [scores, visible.hidden])
        weights = nodes.one("Softmax", [self._shape_of_scores(scores)], {"axis": -1})
        found = nodes.one("MatMul", [self._shape_of_scores(weights), values])
        size = self.dims.query_heads * self.dims.head_dim
        return _attended(nodes.one("Reshape", [self._by_row(nodes, found), nodes.constant([0, 0, size])]), keys, values)

    def _of_trees(
        self,
        nodes: Nodes,
        rows: Sequence[ir.Value],
        caches: Sequence[ir.Value],
        visible: Visible,
        numbers: Mapping[str, float],
    ) -> list[ir.Value]:
        def by_slot(value: ir.Value) -> ir.Value:
            gathered = nodes.one("Gather", [value, visible.rows], {"axis": 1})
            return nodes.one("Transpose", [nodes.one("Reshape", [gathered, visible.by_head])], {"perm": [0, 2, 1, 3]})

        # The operator arranges keys and values anew for each head that it is given.
        queries, keys, values = self._written(nodes, [by_slot(one) for one in rows], caches)
        found = nodes.one("Attention", [queries, keys, values, visible.hidden], dict(numbers))
        size = self.dims.query_heads * self.dims.head_dim
        flat = nodes.one("Reshape", [self._by_row(nodes, found), nodes.constant([1, -1, size])])
        return _attended(nodes.one("Gather", [flat, visible.places], {"axis": 1}), keys, values)

    def _by_head(self, nodes: Nodes, rows: ir.Value) -> ir.Value:
        """Return `rows` [P, W, Hkv N] of slots as [P, Hkv, W, N]."""
        apart = nodes.one("Reshape", [rows, nodes.constant([0, 0, self.dims.key_value_heads, -1])])
        return nodes.one("Transpose", [apart], {"perm": [0, 2, 1, 3]})

    def _by_row(self, nodes: Nodes, found: ir.Value) -> ir.Value:
        """Return what was `found` for query heads [P, Hkv, W G, D] as [P, W, Hkv, G D]."""
        apart = nodes.one("Reshape", [found, nodes.constant([0, 0, -1, self.shared * self.dims.head_dim])])
        return nodes.one("Transpose", [apart], {"perm": [0, 2, 1, 3]})

    def _written(
        self, nodes: Nodes, rows: Sequence[ir.Value], caches: Sequence[ir.Value]
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return queries [P, Hkv, W G, D], and keys and values, cached and new, of rows by head."""
        queries, *new = rows
        keys, values = (
            nodes.one("TensorScatter", [cache, one, self.cache_length], {"axis": 2})
            for cache, one in zip(caches, new, strict=True)
        )
        return nodes.one("Reshape", [queries, nodes.constant([0, 0, -1, self.dims.head_dim])]), keys, values

    def _shape_of_scores(self, scores: ir.Value) -> ir.Value:
        # ONNX Runtime writes a result where its input was if it knows that both have one shape.
        scores.type = ir.TensorType(ir.DataType.FLOAT)
        scores.shape = ir.Shape(["score_slots", self.dims.key_value_heads, "score_rows", "score_places"])
        return scores


def _attended(out: ir.Value, keys: ir.Value, values: ir.Value) -> list[ir.Value]:
    """State what the outputs of a branch of a layer are."""
    return [typed(one, ir.DataType.FLOAT, rank) for one, rank in ((out, 3), (keys, 4), (values, 4))]
