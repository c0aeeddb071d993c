"""Noise for sampling: a number for each token at each position, from a seed.

A token is drawn by an exponential race (the Gumbel-max trick): each token waits for a time that is exponentially
distributed with its weight as the rate, and the first one wins. That is a draw with probabilities in proportion to the
weights. As a token's noise is its own, two similar distributions mostly have the same winner: drafts that take part in
the same race foresee the draw (compare "coupling without communication", arXiv 2408.07978), and rounding changes it
only where two tokens finish together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.arrays import FloatArray, IntArray

# Constants of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), which gives
# its n-th number without those before.
GAMMA = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
# Bits more than a float has.
SURPLUS = np.uint64(11)


class Noise:
    """The noise of `seed`, from `position`, its `start`, on.

    Each position has a key from Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), whose key
    is the seed and whose counter the position; a token's number is that token's of the SplitMix64 with this key.
    """

    def __init__(self, seed: int, position: int) -> None:
        self._bits = np.random.Philox(key=seed, counter=position)
        self.start = position
        self._keys: list[np.uint64] = []

    def key(self, position: int) -> np.uint64:
        """Return the key of a `position`."""
        while len(self._keys) <= position - self.start:
            # One count of the counter gives four words; the others are left unused.
            self._keys.append(self._bits.random_raw(4)[0])
        return self._keys[position - self.start]

    def uniforms(self, position: int, tokens: IntArray) -> FloatArray:
        """Return numbers between 0 and 1, both left out, of `tokens` [N] at `position`."""
        words = (tokens + 1).astype(np.uint64)
        words *= GAMMA
        words += self.key(position)
        first, second, third = SHIFTS
        words ^= words >> first
        words *= MULTIPLIERS[0]
        words ^= words >> second
        words *= MULTIPLIERS[1]
        words ^= words >> third
        words >>= SURPLUS
        numbers = words.astype(np.float64)
        numbers += 0.5
        numbers *= 2.0**-53
        return numbers

    def waits(self, position: int, tokens: IntArray) -> FloatArray:
        """Return how long `tokens` [N] wait at `position`, each with weight 1: exponentially distributed numbers."""
        return -np.log(self.uniforms(position, tokens))

    def first(self, position: int, tokens: IntArray, weights: NDArray[np.floating]) -> int:
        """Return the index of the first of `tokens` [N] with these weights [N], not all 0, at `position`."""
        numbers = self.uniforms(position, tokens)
        # No logarithm of all: -log(u) is at least 1 - u.
        with np.errstate(divide="ignore", invalid="ignore"):
            least = (1.0 - numbers) / weights
            likely = int(np.nanargmin(least))
            bound = -np.log(numbers[likely]) / weights[likely]
            near = np.flatnonzero(least <= bound * (1 + 1e-9))
            return int(near[np.argmin(-np.log(numbers[near]) / weights[near])])
