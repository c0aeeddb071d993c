"""Choices: a request says what it wants back of a row of logits, and gets that.

The whole vocabulary is seldom needed: a greedy request wants the most probable token, a sampled one the winner of its
race. Saying so leaves it to the engine where the choice is made. An engine whose logits are on the host calls `choose`;
one whose logits are on a GPU may send the few tokens that the choice depends on in the place of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from runtime.arrays import FloatArray, IntArray
from runtime.sampling.candidates import candidates
from runtime.sampling.noise import Noise, race

Logits = NDArray[np.float32]

# In a race of all tokens, those whose logits are so far below the largest are looked at only where their noise is large
# enough for them to win all the same.
DEPTH = 12.0
# Where more tokens than these are within it, it is halved, down to the least.
MOST_NEAR = 2048
LEAST_DEPTH = 0.1
SMALLEST_LOGIT = float(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token chosen from logits whose largest is `top`; where that is not finite the token has no meaning."""

    token: int
    top: float


# One row comes back as a token, or as the logits [V] to choose from.
Choice = Chosen | Logits


class ArgMax:
    """The most probable token; among equals the smallest, as `argmax` of other libraries."""

    def choose(self, logits: Logits, position: int) -> Chosen:
        """Return it of logits [V], for the token at the absolute `position`; they stay as they are."""
        token = int(logits.argmax())
        return Chosen(token, float(logits[token]))


class WholeLogits:
    """The logits themselves, for choices that depend on more than one row."""

    def choose(self, logits: Logits, position: int) -> Logits:
        """Return logits [V] as they are."""
        return logits


class Race:
    """The winner of the race of the tokens that the options keep (see `runtime.sampling.noise`): one draw from the
    softmax of logits [V] / temperature.

    Options mean what they do in `Sampling`; `vocab_size` is V. `runtime.sampling.parts` makes the same choice of a part
    of the logits.
    """

    def __init__(
        self,
        noise: Noise,
        vocab_size: int,
        temperature: float,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ) -> None:
        self.noise = noise
        self.temperature = temperature
        # Options that keep all tokens are none.
        self.top_k = None if top_k is None or top_k >= vocab_size else top_k
        self.top_p = None if top_p is None or top_p >= 1.0 else top_p
        self.min_p = min_p or None
        self._divisor = np.float32(temperature)
        self._tempered = np.empty(vocab_size, dtype=np.float32)
        self._weights = np.empty(vocab_size, dtype=np.float32)

    def choose(self, logits: Logits, position: int) -> Chosen:
        """Return it of logits [V], for the token at the absolute `position`; they stay as they are."""
        if self.top_k is None and self.top_p is None:
            return self._of_all(logits, position)
        if self.temperature != 1.0:
            logits = np.divide(logits, self._divisor, out=self._tempered)
        top = float(logits.max())
        if not math.isfinite(top):
            return Chosen(-1, top)
        tokens, weights = candidates(
            logits, top, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, out=self._weights
        )
        assert tokens is not None, "top-k and top-p keep some tokens of all"
        return Chosen(int(tokens[self.noise.first(position, tokens, weights)]), top)

    def _of_all(self, logits: Logits, position: int) -> Chosen:
        """Return the winner where all tokens take part, or those that min-p keeps.

        Few have a chance: those whose logits are near the largest, and those whose noise is so large that they win
        with the largest weight that the others may have. So no weights are computed of all tokens, and no waits.
        """
        largest = logits.max()
        # Dividing by a number above 0 and rounding keep the order: the same as the largest of all quotients.
        top = float(largest / self._divisor)
        if not math.isfinite(top):
            return Chosen(-1, top)
        cut, near = self._near(logits, float(largest), top)
        # What is left out has a smaller logit than the cut, and so no larger weight; the factor is for rounding.
        with np.errstate(over="ignore"):
            weight = 1.00001 * math.exp(float(cut / self._divisor - np.float32(top)))
        if len(near) == len(logits) or weight < (self.min_p or 0.0):
            return Chosen(self._race(logits, near, partial(self.noise.uniforms, position), top)[0], top)
        noise = self.noise.of_all(position, len(logits))
        first, wait = self._race(logits, near, noise.uniforms, top)
        # They wait for at least 1 - their number, divided by their weight.
        others = noise.reaching(1.0 - wait * weight * (1 + 1e-9) - 2.0**-50)
        if len(others):
            # In rising order, as of equal waits the first counts.
            few = np.sort(np.append(others, first))
            first, _ = self._race(logits, few, noise.uniforms, top)
        return Chosen(first, top)

    def _near(self, logits: Logits, largest: float, top: float) -> tuple[np.float32, IntArray]:
        """Return a logit, and the tokens whose logits are that or more, in rising order, the largest among them."""
        depth = DEPTH
        cut = self._cut(largest, top, depth)
        near = (logits >= cut).nonzero()[0]
        if len(near) > MOST_NEAR:
            values = logits[near]
            while len(near) > MOST_NEAR and depth > LEAST_DEPTH:
                depth /= 2
                cut = self._cut(largest, top, depth)
                kept = values >= cut
                near, values = near[kept], values[kept]
        return cut, near

    def _cut(self, largest: float, top: float, depth: float) -> np.float32:
        return np.float32(min(max((top - depth) * self.temperature, SMALLEST_LOGIT), largest))

    def _race(
        self, logits: Logits, tokens: IntArray, uniforms: Callable[[IntArray], FloatArray], top: float
    ) -> tuple[int, float]:
        """Return the winner of a race of `tokens` [N] alone, which have these numbers and one of which takes part at
        least; and its wait.
        """
        within, weights = candidates(logits[tokens] / self._divisor, top, min_p=self.min_p)
        if within is not None:
            tokens = tokens[within]
        first, wait = race(uniforms(tokens), weights)
        return int(tokens[first]), wait


# All that can be wanted back of each row of a pass.
Wanted = ArgMax | Race | WholeLogits
