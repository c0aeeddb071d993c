"""Choices: a request says what it wants back of a row of logits, and gets that.

The whole vocabulary is seldom needed: a greedy request wants the most probable token, a sampled one the winner of its
race. Saying so leaves it to the engine where the choice is made. An engine whose logits are on the host calls `choose`;
one whose logits are on a GPU may send the few tokens that the choice depends on in the place of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.sampling.candidates import candidates
from runtime.sampling.noise import Noise

Logits = NDArray[np.float32]


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
        self._tempered = np.empty(vocab_size, dtype=np.float32)
        self._weights = np.empty(vocab_size, dtype=np.float32)
        self._all = np.arange(vocab_size)

    def choose(self, logits: Logits, position: int) -> Chosen:
        """Return it of logits [V], for the token at the absolute `position`; they stay as they are."""
        if self.temperature != 1.0:
            logits = np.divide(logits, np.float32(self.temperature), out=self._tempered)
        top = float(logits.max())
        if not math.isfinite(top):
            return Chosen(-1, top)
        tokens, weights = candidates(
            logits, top, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, out=self._weights
        )
        if tokens is None:
            tokens = self._all
        return Chosen(int(tokens[self.noise.first(position, tokens, weights)]), top)


# All that can be wanted back of each row of a pass.
Wanted = ArgMax | Race | WholeLogits
