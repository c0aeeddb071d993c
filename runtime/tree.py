"""Trees of candidate tokens.

A tree's node 0 is the token already certain. Nodes are in topological order; a node at depth k is a candidate for the
k-th token after the certain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from runtime.arrays import IntArray

# No tree is larger: beyond it a pass is no faster than the passes that it saves.
MOST_ROWS = 1024
PseudoRows = Annotated[int, Meta(ge=0, le=MOST_ROWS)]


@dataclass(frozen=True)
class TreeSizes:
    """Rows of one decoding pass: at most `tree_rows` candidates, and `pseudo_rows[k]` pseudo rows of step k + 1."""

    tree_rows: Annotated[int, Meta(ge=1, le=MOST_ROWS)]
    pseudo_rows: tuple[PseudoRows, ...]

    @property
    def draft_steps(self) -> int:
        """The number of draft steps with pseudo rows: a step is of use only if those before it have some."""
        return next((k for k, rows in enumerate(self.pseudo_rows) if not rows), len(self.pseudo_rows))

    def check(self, num_steps: int) -> None:
        """Raise `ValueError` unless these are sizes for so many draft steps: none has more pseudo rows than the tree
        may have candidates, or any after a step without.
        """
        if len(self.pseudo_rows) != num_steps:
            raise ValueError(f"{len(self.pseudo_rows)} pseudo_rows for {num_steps} transfer_layers")
        if max(self.pseudo_rows, default=0) > self.tree_rows:
            raise ValueError(f"pseudo_rows {list(self.pseudo_rows)} with more than tree_rows, {self.tree_rows}")
        if any(self.pseudo_rows[self.draft_steps :]):
            raise ValueError(f"pseudo_rows {list(self.pseudo_rows)} with some after a 0")

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


def tree_of(
    tokens: Sequence[int], parents: Sequence[int], depths: Sequence[int], probabilities: Sequence[float]
) -> Tree:
    """Return the tree of these nodes, the root first and parents before children."""
    return Tree(
        np.array(tokens, dtype=np.int64),
        np.array(parents, dtype=np.int64),
        np.array(depths, dtype=np.int64),
        np.array(probabilities, dtype=np.float64),
    )


# Those of every tree that is its root alone, as in plain decoding.
_ROOT_PARENTS, _ROOT_DEPTHS = np.array([-1], dtype=np.int64), np.array([0], dtype=np.int64)
_ROOT_PROBABILITIES = np.array([1.0])
for _shared in (_ROOT_PARENTS, _ROOT_DEPTHS, _ROOT_PROBABILITIES):
    _shared.setflags(write=False)


def root_alone(token: int) -> Tree:
    """Return the tree of the certain `token` alone."""
    return Tree(np.array([token], dtype=np.int64), _ROOT_PARENTS, _ROOT_DEPTHS, _ROOT_PROBABILITIES)


def chain(tokens: Sequence[int]) -> Tree:
    """Return `tokens` as a tree without branches: how a chunk of the prompt is run."""
    count = len(tokens)
    return Tree(
        np.array(tokens, dtype=np.int64),
        np.arange(-1, count - 1, dtype=np.int64),
        np.arange(count, dtype=np.int64),
        np.ones(count, dtype=np.float64),
    )


def candidate_path(root: int, tokens: Sequence[int], probabilities: Sequence[float]) -> Tree:
    """Return the certain token `root` and N candidates after it, one after the other, as a tree without branches.

    probabilities [N] are of each token, given that those before it are right.
    """
    if not len(tokens):
        return root_alone(root)
    path = chain([root, *tokens])
    paths: NDArray[np.float64] = np.cumprod(np.array([1.0, *probabilities], dtype=np.float64), dtype=np.float64)
    return Tree(path.tokens, path.parents, path.depths, paths)
