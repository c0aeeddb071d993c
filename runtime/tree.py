"""Trees of candidate tokens, and the rows that one engine pass gives them.

A tree's node 0 is the token already certain. Nodes are in topological order; a node at depth k is a candidate for the
k-th token after the certain one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.drafts import Drafts, IntArray

# No tree is larger: beyond it a pass is no faster than the passes that it saves.
MOST_ROWS = 1024


@dataclass(frozen=True)
class TreeSizes:
    """Rows of one decoding pass: at most `tree_rows` candidates, and `pseudo_rows[k]` pseudo rows of step k + 1."""

    tree_rows: int
    pseudo_rows: tuple[int, ...]

    @property
    def draft_steps(self) -> int:
        """How many draft steps have pseudo rows: a step is of use only if those before it have some."""
        return next((k for k, rows in enumerate(self.pseudo_rows) if not rows), len(self.pseudo_rows))

    @classmethod
    def plain(cls, num_steps: int) -> TreeSizes:
        """Return the sizes of plain decoding: the certain token alone, nothing drafted."""
        return cls(1, (0,) * num_steps)


@dataclass(frozen=True)
class Tree:
    """T candidate tokens: tokens [T], parents [T] (-1 for the root), depths [T], path probabilities [T]."""

    tokens: IntArray
    parents: IntArray
    depths: IntArray
    probabilities: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> Tree:
        """Return the tree of the first `count` nodes: of a best-first tree, the best-first tree of that size."""
        if count >= len(self):
            return self
        return Tree(self.tokens[:count], self.parents[:count], self.depths[:count], self.probabilities[:count])

    def child(self, node: int, token: int) -> int | None:
        """Return the child of `node` that holds `token`, or None."""
        for child in range(node + 1, len(self)):
            if self.parents[child] == node and self.tokens[child] == token:
                return child
        return None

    def end_probabilities(self) -> NDArray[np.float64]:
        """Return [T]: how probable it is that acceptance ends at each node, by the draft's own probabilities."""
        ends = self.probabilities.copy()
        np.subtract.at(ends, self.parents[1:], self.probabilities[1:])
        return ends


@dataclass(frozen=True)
class Rows:
    """The inputs of one pass for one sequence, without the batch dimension; shapes as in `runtime.bindings`."""

    input_ids: IntArray
    position_ids: IntArray
    tree_mask: NDArray[np.bool_]
    pseudo_parents: tuple[IntArray, ...]
    logit_rows: IntArray


def best_first_tree(root: int, drafts: Drafts, max_rows: int) -> Tree:
    """Return the tree of at most `max_rows` nodes with the highest path probabilities.

    A path's probability is the product of its tokens' draft probabilities, step by step, as in Medusa's and EAGLE's
    trees. No drafts give a tree of the root alone.
    """
    tokens, parents, depths, probabilities = [root], [-1], [0], [1.0]
    # Each entry stands for the rank-th candidate below a parent. Taken, it brings in its next sibling and first child.
    heap: list[tuple[float, int, int, int]] = []

    def consider(parent: int, rank: int) -> None:
        depth = depths[parent]
        if depth < len(drafts) and rank < len((step := drafts.after(depth, tokens[parent])).tokens):
            path = probabilities[parent] * float(step.probabilities[rank])
            heapq.heappush(heap, (-path, depth, parent, rank))

    consider(0, 0)
    while heap and len(tokens) < max_rows:
        path, depth, parent, rank = heapq.heappop(heap)
        tokens.append(int(drafts.after(depth, tokens[parent]).tokens[rank]))
        parents.append(parent)
        depths.append(depth + 1)
        probabilities.append(-path)
        if len(tokens) < max_rows:
            consider(parent, rank + 1)
            consider(len(tokens) - 1, 0)
    return Tree(
        np.array(tokens, dtype=np.int64),
        np.array(parents, dtype=np.int64),
        np.array(depths, dtype=np.int64),
        np.array(probabilities, dtype=np.float64),
    )


def graft(tree: Tree, tokens: Sequence[int], probabilities: Sequence[float], max_rows: int) -> Tree:
    """Return `tree` with a chain of `tokens` from its root: the `max_rows` nodes with the highest path probabilities.

    probabilities [N] are what the chain says of each token, given those before it. Where the tree knows better what
    follows, the chain counts for less: its odds are multiplied by those that the tree leaves it, where these are low.
    """
    own_tokens, parents, depths = tree.tokens.tolist(), tree.parents.tolist(), tree.depths.tolist()
    above = tree.probabilities[tree.parents[1:]]
    given = [1.0, *np.divide(tree.probabilities[1:], above, out=np.zeros_like(above), where=above > 0.0).tolist()]
    node = 0
    for token, probability in zip(tokens, probabilities, strict=False):
        children = [child for child in range(node + 1, len(parents)) if parents[child] == node]
        same = next((child for child in children if own_tokens[child] == token), None)
        against = max((given[child] for child in children if child != same), default=0.0)
        agreed = given[same] if same is not None else 0.0
        odds = probability * (1 - against)
        weight = odds / (odds + (1 - probability) * max(against, 1 - against))
        for child in children:
            given[child] *= 1 - weight
        if same is None:
            same = len(parents)
            own_tokens.append(token)
            parents.append(node)
            depths.append(depths[node] + 1)
            given.append(0.0)
        given[same] = weight + (1 - weight) * agreed
        node = same
    paths = [1.0]
    for child in range(1, len(parents)):
        paths.append(paths[parents[child]] * given[child])
    # A node is never more probable than its parent, and of equals the nearer one comes first: parents before children.
    order = sorted(range(len(paths)), key=lambda node: (-paths[node], depths[node]))[:max_rows]
    place = {node: new for new, node in enumerate(order)}
    return Tree(
        np.array([own_tokens[node] for node in order], dtype=np.int64),
        np.array([-1, *(place[parents[node]] for node in order[1:])], dtype=np.int64),
        np.array([depths[node] for node in order], dtype=np.int64),
        np.array([paths[node] for node in order], dtype=np.float64),
    )


def chain(tokens: Sequence[int]) -> Tree:
    """Return `tokens` as a tree without branches: how a chunk of the prompt is run."""
    count = len(tokens)
    return Tree(
        np.array(tokens, dtype=np.int64),
        np.arange(-1, count - 1, dtype=np.int64),
        np.arange(count, dtype=np.int64),
        np.ones(count, dtype=np.float64),
    )


def likely_ends(tree: Tree, pseudo_rows: Sequence[int]) -> tuple[IntArray, ...]:
    """Return, per draft step, the nodes that get a pseudo row: those where acceptance most probably ends."""
    order = np.argsort(-tree.end_probabilities(), kind="stable")
    return tuple(np.sort(order[:count]) for count in pseudo_rows)


def lay_out(
    tree: Tree,
    pseudo_parents: tuple[IntArray, ...],
    join_order: Sequence[int],
    start: int,
    logit_rows: IntArray | None = None,
) -> Rows:
    """Return the rows of one pass: the tree's nodes, then each step's pseudo rows in `join_order`.

    `start` is the absolute position of the tree's root. A node sees itself and its ancestors; a pseudo row sees what
    its parent sees, itself, and its parent's earlier steps. `logit_rows` None asks for every node's logits.
    """
    size = len(tree)
    tree_part = _ancestors(tree)
    parents = np.concatenate([pseudo_parents[k] for k in join_order]) if pseudo_parents else np.empty(0, np.int64)
    steps = np.repeat(np.array(join_order, dtype=np.int64), [len(pseudo_parents[k]) for k in join_order])
    mask = np.zeros((size + len(parents),) * 2, dtype=bool)
    mask[:size, :size] = tree_part
    mask[size:, :size] = tree_part[parents]
    mask[size:, size:] = (parents[:, None] == parents[None, :]) & (steps[None, :] <= steps[:, None])
    positions = np.concatenate([tree.depths, tree.depths[parents] + steps + 1]) + start
    wanted = np.arange(size, dtype=np.int64) if logit_rows is None else logit_rows
    return Rows(tree.tokens, positions, mask, pseudo_parents, wanted)


def _ancestors(tree: Tree) -> NDArray[np.bool_]:
    mask = np.eye(len(tree), dtype=bool)
    for node in range(1, len(tree)):
        mask[node] |= mask[tree.parents[node]]
    return mask
