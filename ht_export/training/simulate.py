"""Tokens per step of a tree, from the drafts at every position: the draft-and-verify loop without the model.

The base model's text is known, so which node each step ends at is too. What follows is exact for greedy decoding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.tree import DraftStep, TreeSizes, best_first_tree, likely_ends


@dataclass(frozen=True)
class TextDrafts:
    """The drafts at A successive positions of a text.

    tokens [A, K, N] best first, with probabilities [A, K, N]; labels [A, K]: the text's own tokens.
    """

    tokens: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    labels: NDArray[np.int64]

    @property
    def num_steps(self) -> int:
        """K, the number of draft steps."""
        return self.labels.shape[1]

    @property
    def hits(self) -> NDArray[np.bool_]:
        """Whether each candidate is the text's own token, [A, K, N]."""
        return self.tokens == self.labels[:, :, None]


def tokens_per_step(texts: Iterable[TextDrafts], sizes: TreeSizes) -> float:
    """Return the mean number of tokens that a step makes certain over all texts; plain decoding has 1.0."""
    steps = tokens = 0
    for text in texts:
        for advance in advances(text, sizes):
            steps += 1
            tokens += advance
    return tokens / steps if steps else 0.0


def advances(text: TextDrafts, sizes: TreeSizes) -> Iterable[int]:
    """Yield the tokens of each step through `text`: the accepted ones and the certain one."""
    position = 0
    drafted = sum(1 for rows in sizes.pseudo_rows if rows)
    while position < len(text.labels):
        drafts = [
            DraftStep(text.tokens[position, k, : sizes.tree_rows], text.probabilities[position, k, : sizes.tree_rows])
            for k in range(drafted)
        ]
        # The root's own token does not matter here.
        tree = best_first_tree(0, drafts, sizes.tree_rows)
        node = 0
        accepted = 0
        while accepted < drafted:
            child = tree.child(node, int(text.labels[position, accepted]))
            if child is None:
                break
            node, accepted = child, accepted + 1
        yield accepted + 1
        position += accepted + 1
        ends = likely_ends(tree, sizes.pseudo_rows)
        drafted = next((k for k, nodes in enumerate(ends) if node not in nodes), len(ends))
