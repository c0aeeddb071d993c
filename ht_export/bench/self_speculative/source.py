"""Drafts of the model without some of its blocks, one token after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.drafting.source import Context
from runtime.tree import Tree, tree_of


class Drafting(Protocol):
    """A model that drafts: see `DraftModel`."""

    def begin(self, length: int, rows: int) -> None:
        """Have room for `rows` drafted tokens behind `length` certain ones."""
        ...

    def logits(self, token: int, length: int) -> NDArray[np.float32]:
        """Return the logits [V] of what follows `token`, at position `length`."""
        ...


class SelfDrafts:
    """A chain of up to `most` tokens, each the most probable one; it ends with the first that the draft gives less than
    `confidence`, which is verified too, as it is there. See `DraftSource`.
    """

    name = "self-speculation"

    def __init__(self, model: Drafting, most: int, confidence: float) -> None:
        self._model = model
        self._most = most
        self._confidence = confidence

    def shortlist(self, max_rows: int) -> int:
        """See `DraftSource.shortlist`."""
        return 0

    def propose(self, context: Context) -> Tree:
        """See `DraftSource.propose`."""
        most = min(self._most, context.max_rows - 1)
        self._model.begin(context.length, most)
        tokens, probabilities = [context.token], [1.0]
        while len(tokens) <= most:
            logits = self._model.logits(tokens[-1], context.length + len(tokens) - 1)
            token = int(logits.argmax())
            sure = float(1.0 / np.exp(logits - logits[token]).sum())
            if not np.isfinite(sure):
                break
            tokens.append(token)
            probabilities.append(probabilities[-1] * sure)
            if sure < self._confidence:
                break
        depths = range(len(tokens))
        return tree_of(tokens, [depth - 1 for depth in depths], depths, probabilities)

    def accept(self, tokens: Sequence[int]) -> None:
        """See `DraftSource.accept`: what is certain is in the cache."""
