"""Drafts: what may follow a token, from the draft logits of one node's pseudo rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.arrays import FloatArray, IntArray
from runtime.sampling.candidates import largest, sum_of_weights


@dataclass(frozen=True)
class DraftStep:
    """The most probable tokens of one draft step, best first: tokens [N], probabilities [N]."""

    tokens: IntArray
    probabilities: FloatArray


class Drafts(Protocol):
    """The drafts of K steps."""

    def __len__(self) -> int:
        """Return K."""
        ...

    def after(self, step: int, token: int) -> DraftStep:
        """Return the candidates of `step` (0-based) where the token before them is `token`."""
        ...


class IndependentDrafts(list[DraftStep]):
    """Drafts that are the same whatever the token before."""

    def after(self, step: int, token: int) -> DraftStep:
        """See `Drafts.after`."""
        return self[step]


class AdjustedDrafts:
    """Drafts with other probabilities: `adjust` makes them of a step's number and its candidates."""

    def __init__(self, drafts: Drafts, adjust: Callable[[int, DraftStep], DraftStep]) -> None:
        self.drafts = drafts
        self.adjust = adjust
        self._known: dict[tuple[int, int], DraftStep] = {}

    def __len__(self) -> int:
        return len(self.drafts)

    def after(self, step: int, token: int) -> DraftStep:
        """See `Drafts.after`."""
        if (found := self._known.get((step, token))) is None:
            found = self._known[step, token] = self.adjust(step, self.drafts.after(step, token))
        return found


def most_probable(logits: NDArray[np.float32], count: int) -> DraftStep:
    """Return the `count` most probable tokens of a softmax over logits [V]."""
    near = largest(logits, min(count, len(logits)))
    values = logits[near]
    return ranked(near, values, count, sum_of_weights(logits, float(values.max())))


def ranked(tokens: IntArray, logits: NDArray[np.float32], count: int, total: float) -> DraftStep:
    """Return the `count` most probable of `tokens` [N], in rising order, which with all that equals them are among
    those: their `logits` [N], and the sum `total` of exp(logit - largest) of the whole vocabulary.
    """
    # Equal logits: the smaller token first.
    order = (-logits).argsort(kind="stable")[:count]
    values = logits[order]
    return DraftStep(tokens[order], np.exp((values - values[0]).astype(np.float64)) / total)
