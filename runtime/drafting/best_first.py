"""Best-first trees: the candidates that are most probably accepted, from any number of proposals."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np

from runtime.arrays import IntArray
from runtime.drafting.drafts import Drafts
from runtime.tree import Tree, root_alone, tree_of

NOBODY: IntArray = np.empty(0, dtype=np.int64)


def best_first_tree(root: int, drafts: Drafts, max_rows: int, least: float = 0.0) -> Tree:
    """Return the tree of at most `max_rows` nodes with the highest path probabilities, none below `least`.

    A path's probability is the product of its tokens' draft probabilities, step by step, as in Medusa's and EAGLE's
    trees. No drafts give a tree of the root alone.
    """
    if not len(drafts) or max_rows == 1:
        return root_alone(root)
    tokens, parents, depths, probabilities = [root], [-1], [0], [1.0]
    # Each entry stands for the rank-th candidate below a parent. Taken, it brings in its next sibling and first child.
    heap: list[tuple[float, int, int, int]] = []

    def consider(parent: int, rank: int) -> None:
        depth = depths[parent]
        if depth < len(drafts) and rank < len((step := drafts.after(depth, tokens[parent])).tokens):
            path = probabilities[parent] * float(step.probabilities[rank])
            if path >= least:
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
    return tree_of(tokens, parents, depths, probabilities)


def merge(root: int, proposals: Iterable[Tree], max_rows: int) -> Tree:
    """Return one tree of the `proposals`, each with `root` at its root: the `max_rows` nodes with the highest path
    probabilities.
    """
    trees = [tree for tree in proposals if len(tree) > 1]
    return reduce(_joined, trees).first(max_rows) if trees else root_alone(root)


def _joined(tree: Tree, other: Tree) -> Tree:
    """Return the nodes of both, by falling path probabilities.

    Below each node the two are mixed, `other` with the more weight the surer it is. Where `tree` knows better what
    follows, `other` counts for less: the odds of its likeliest token are multiplied by those that `tree` leaves it,
    where these are low.
    """
    tokens, parents, depths = tree.tokens.tolist(), tree.parents.tolist(), tree.depths.tolist()
    given, proposed = _given(tree), _given(other)
    below: list[list[int]] = [[] for _ in range(len(other))]
    for node, parent in enumerate(other.parents[1:].tolist(), start=1):
        below[parent].append(node)
    # For each node of `other` its place in the joined tree.
    places = [0] * len(other)
    for parent, nodes in enumerate(below):
        if not nodes:
            continue
        place = places[parent]
        children = [child for child in range(place + 1, len(parents)) if parents[child] == place]
        same = {tokens[child]: child for child in children}
        likeliest = max(nodes, key=proposed.__getitem__)
        token, sure = int(other.tokens[likeliest]), proposed[likeliest]
        against = max((given[child] for child in children if tokens[child] != token), default=0.0)
        left = sure * (1 - against) + (1 - sure) * max(against, 1 - against)
        share = (1 - against) / left if left > 0.0 else 0.0
        kept = max(0.0, 1.0 - share * sum(proposed[node] for node in nodes))
        for child in children:
            given[child] *= kept
        for node in nodes:
            token = int(other.tokens[node])
            if token not in same:
                same[token] = len(parents)
                tokens.append(token)
                parents.append(place)
                depths.append(depths[place] + 1)
                given.append(0.0)
            places[node] = same[token]
            given[same[token]] += share * proposed[node]
    paths = [1.0]
    for child in range(1, len(parents)):
        paths.append(paths[parents[child]] * given[child])
    return by_falling_probability(tokens, parents, depths, paths)[0]


def by_falling_probability(
    tokens: Sequence[int], parents: Sequence[int], depths: Sequence[int], paths: Sequence[float]
) -> tuple[Tree, dict[int, int]]:
    """Return the tree of these nodes, whose path probabilities are `paths`, the most probable first, and the new place
    of each.
    """
    # A node is never more probable than its parent, and among equals the nearer one comes first: parents before
    # children.
    order = sorted(range(len(paths)), key=lambda node: (-paths[node], depths[node]))
    new = {node: index for index, node in enumerate(order)}
    tree = tree_of(
        [tokens[node] for node in order],
        [-1, *(new[parents[node]] for node in order[1:])],
        [depths[node] for node in order],
        [paths[node] for node in order],
    )
    return tree, new


def _given(tree: Tree) -> list[float]:
    """Return [T]: the probability of each node, given that its parent is right."""
    above = tree.probabilities[tree.parents[1:]]
    below = np.divide(tree.probabilities[1:], above, out=np.zeros_like(above), where=above > 0.0)
    return [1.0, *below.tolist()]


def likely_ends(tree: Tree, pseudo_rows: Sequence[int]) -> tuple[IntArray, ...]:
    """Return, per draft step, the nodes that get a pseudo row: those where acceptance most probably ends."""
    if not any(pseudo_rows):
        return (NOBODY,) * len(pseudo_rows)
    order = (-tree.end_probabilities()).argsort(kind="stable")
    return tuple(np.sort(order[:count]) for count in pseudo_rows)
