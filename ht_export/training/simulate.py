"""Tokens per step of a tree, from the drafts at every position: the draft-and-verify loop without the model.

The base model's text is known, so which node each step ends at is too. The result is exact for greedy decoding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.drafting.best_first import best_first_tree, likely_ends
from runtime.drafting.correction import SHORTLIST, TokenCorrection, corrected
from runtime.drafting.drafts import Drafts, DraftStep
from runtime.tree import TreeSizes


@dataclass(frozen=True)
class TextDrafts:
    """The drafts at A successive positions of a text.

    tokens [A, K, N] best first, with probabilities [A, K, N], before any correction; labels [A, K], the text's own
    tokens; certain [A], the token before those of step 1.
    """

    tokens: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    labels: NDArray[np.int64]
    certain: NDArray[np.int64]
    correction: TokenCorrection | None

    @property
    def num_steps(self) -> int:
        """K, the number of draft steps."""
        return self.labels.shape[1]

    def drafts(self, position: int, steps: int, count: int) -> Drafts:
        """Return the drafts of the first `steps` steps at `position`, with `count` candidates each."""
        kept = count if self.correction is None else max(count, SHORTLIST)
        shortlists = [
            DraftStep(self.tokens[position, k, :kept], self.probabilities[position, k, :kept]) for k in range(steps)
        ]
        return corrected(shortlists, self.correction, count)


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
    drafted = next((k for k, rows in enumerate(sizes.pseudo_rows) if not rows), len(sizes.pseudo_rows))
    while position < len(text.labels):
        drafts = text.drafts(position, drafted, sizes.tree_rows)
        tree = best_first_tree(int(text.certain[position]), drafts, sizes.tree_rows)
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
