"""Random trees to check passes with; numpy is all that they need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.arrays import IntArray
from runtime.tree import Tree, chain


def random_chain(rng: np.random.Generator, vocab_size: int, rows: int) -> Tree:
    """Return random tokens without branches, as in a prompt."""
    return chain(rng.integers(0, vocab_size, rows).tolist())


def random_tree(rng: np.random.Generator, vocab_size: int, rows: int) -> Tree:
    """Return a random tree of random tokens."""
    tokens = random_chain(rng, vocab_size, rows)
    parents = [-1, *(int(rng.integers(0, node)) for node in range(1, rows))]
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return Tree(tokens.tokens, np.array(parents), np.array(depths), tokens.probabilities)


def random_ends(rng: np.random.Generator, rows: int, counts: Sequence[int]) -> tuple[IntArray, ...]:
    """Return, per draft step, as many random ones of `rows` nodes as `counts` says, in order."""
    return tuple(np.sort(rng.permutation(rows)[:count]) for count in counts)
