"""What transfer layers are worth on texts, with intervals: tokens per step, their gap, and what more texts would bring.

Intervals are of 95 %, by resampling the texts (a percentile bootstrap): they say how sure the texts make a number, not
what another fit would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ht_export.training.simulate import TextDrafts, advances
from runtime.tree import TreeSizes

RESAMPLES = 2000
QUANTILES = (0.025, 0.975)
# How many times the texts there are an extrapolation is for.
FACTORS = (2, 10)


@dataclass(frozen=True)
class Interval:
    """A number with the ends of its interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: NDArray[np.float64]) -> Interval:
        """Return `value` with the quantiles of what resampling made of it."""
        low, high = np.quantile(resampled, QUANTILES)
        return cls(round(float(value), 4), round(float(low), 4), round(float(high), 4))

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Counts:
    """Tokens [N] and steps [N] of N texts, decoded with trees of one size."""

    tokens: NDArray[np.int64]
    steps: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[TextDrafts], rows: int) -> Counts:
        """Return those of best-first trees of `rows` rows with pseudo rows on every node."""
        found = [list(advances(text, TreeSizes(rows, (rows,) * text.num_steps))) for text in texts]
        return cls(np.array([sum(one) for one in found]), np.array([len(one) for one in found]))

    def rate(self) -> float:
        """Return tokens per step."""
        return float(self.tokens.sum() / max(1, self.steps.sum()))

    def resampled(self, draws: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return tokens per step of each draw of texts: draws [M, N]."""
        return np.asarray(self.tokens[draws].sum(1) / np.maximum(1, self.steps[draws].sum(1)), dtype=np.float64)


def draws_of(texts: int, seed: int) -> NDArray[np.int64]:
    """Return texts drawn with replacement: [RESAMPLES, texts]."""
    return np.random.default_rng(seed).integers(0, texts, (RESAMPLES, texts))


def interval(counts: Counts) -> Interval:
    """Return tokens per step."""
    return Interval.of(counts.rate(), counts.resampled(draws_of(len(counts.steps), 0)))


def gap(trained_on: Counts, held_out: Counts) -> Interval:
    """Return how many tokens per step more the texts trained on have than others."""
    ours = trained_on.resampled(draws_of(len(trained_on.steps), 1))
    others = held_out.resampled(draws_of(len(held_out.steps), 0))
    return Interval.of(trained_on.rate() - held_out.rate(), ours - others)


def learning_curve(sizes: Sequence[int], counts: Sequence[Counts], most: float) -> list[tuple[int, Interval]]:
    """Return tokens per step by number of texts: of fits with `sizes` texts, ascending, all measured on the same texts,
    and beyond them by a straight line over the logarithm, which nothing takes above `most`.
    """
    draws = draws_of(len(counts[0].steps), 0)
    measured = [Interval.of(one.rate(), one.resampled(draws)) for one in counts]
    logs = np.log2(np.array(sizes, dtype=np.float64))
    # The same draws for all fits: what the texts have in common cancels out of the slope.
    values = np.stack([np.array([one.rate() for one in counts]), *np.stack([c.resampled(draws) for c in counts], 1)])
    centred = logs - logs.mean()
    slopes = (values * centred).sum(1) / (centred**2).sum()
    points = list(zip(sizes, measured, strict=True))
    for factor in FACTORS:
        line = values.mean(1) + slopes * (np.log2(sizes[-1] * factor) - logs.mean())
        line = np.minimum(line, most)
        points.append((sizes[-1] * factor, Interval.of(line[0], line[1:])))
    return points
