"""Noise for sampling: a number for each token at each position, from a seed.

A token is drawn by an exponential race (the Gumbel-max trick): each token waits for a time that is exponentially
distributed with its weight as the rate, and the first one wins. That is a draw with probabilities in proportion to the
weights. As a token's noise is its own, two similar distributions mostly have the same winner: drafts that take part in
the same race foresee the draw (compare "coupling without communication", arXiv 2408.07978), and rounding changes it
only where two tokens finish together.
"""

from __future__ import annotations

import math
import threading

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
NONE: IntArray = np.empty(0, dtype=np.int64)
# The last shift leaves so many bits of a word as they are, the highest.
KEPT_BITS = 31


class _Room(threading.local):
    """Memory for the words of all tokens of a vocabulary, one for each thread: `counts` [V] are what SplitMix64 adds to
    a key; `words`, `shifted` and `reached` [V] are written over and over.
    """

    def __init__(self) -> None:
        self._make(0)

    def _make(self, vocab_size: int) -> None:
        self.counts = _counts(np.arange(vocab_size))
        self.words, self.shifted = (np.empty(vocab_size, dtype=np.uint64) for _ in range(2))
        self.reached = np.empty(vocab_size, dtype=bool)

    def fit(self, vocab_size: int) -> _Room:
        """Return it with room for `vocab_size` tokens and no more."""
        if len(self.counts) != vocab_size:
            self._make(vocab_size)
        return self


def _counts(tokens: IntArray) -> NDArray[np.uint64]:
    counts = (tokens + 1).astype(np.uint64)
    counts *= GAMMA
    return counts


def _mix(words: NDArray[np.uint64], shifted: NDArray[np.uint64]) -> None:
    """Mix `words` [N] in place as SplitMix64 does, but for the last of its steps; `shifted` [N] is overwritten."""
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        np.right_shift(words, shift, out=shifted)
        np.bitwise_xor(words, shifted, out=words)
        np.multiply(words, multiplier, out=words)


def _numbers(words: NDArray[np.uint64]) -> FloatArray:
    """Return numbers between 0 and 1, both left out, of `words` [N] that `_mix` has left, which are overwritten."""
    words ^= words >> SHIFTS[2]
    words >>= SURPLUS
    numbers = words.astype(np.float64)
    numbers += 0.5
    numbers *= 2.0**-53
    return numbers


_room = _Room()


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
        words = _counts(tokens)
        words += self.key(position)
        _mix(words, np.empty_like(words))
        return _numbers(words)

    def of_all(self, position: int, vocab_size: int) -> WholeNoise:
        """Return the noise of all tokens below `vocab_size` at `position`. It holds until this thread asks for that of
        another position, in whatever noise.
        """
        room = _room.fit(vocab_size)
        np.add(room.counts, self.key(position), out=room.words)
        _mix(room.words, room.shifted)
        return WholeNoise(room)

    def waits(self, position: int, tokens: IntArray) -> FloatArray:
        """Return how long `tokens` [N] wait at `position`, each with weight 1: exponentially distributed numbers."""
        return -np.log(self.uniforms(position, tokens))

    def first(self, position: int, tokens: IntArray, weights: NDArray[np.floating]) -> int:
        """Return the index of the first of `tokens` [N] with these weights [N], not all 0, at `position`."""
        return race(self.uniforms(position, tokens), weights)[0]


class WholeNoise:
    """The noise of all tokens of a vocabulary at one position. See `Noise.of_all`."""

    __slots__ = ("_room",)

    def __init__(self, room: _Room) -> None:
        self._room = room

    def uniforms(self, tokens: IntArray) -> FloatArray:
        """Return the numbers of `tokens` [N], as `Noise.uniforms` does."""
        return _numbers(self._room.words[tokens])

    def reaching(self, least: float) -> IntArray:
        """Return, in rising order, all tokens whose numbers are `least` or more; some with a little less may be among
        them.
        """
        room = self._room
        # A number is rounded from its word's highest bits: one less is on the safe side.
        highest = max(0, min(int(least * 2.0**KEPT_BITS), 2**KEPT_BITS) - 1)
        bound = np.uint64(highest << (64 - KEPT_BITS))
        # Mostly there is none.
        if room.words.max(initial=0) < bound:
            return NONE
        np.greater_equal(room.words, bound, out=room.reached)
        return room.reached.nonzero()[0]


def race(numbers: FloatArray, weights: NDArray[np.floating]) -> tuple[int, float]:
    """Return the index of the first of N tokens with these numbers [N] and weights [N], not all 0; and how long it
    waits.
    """
    # No logarithm of all: -log(u) is at least 1 - u.
    with np.errstate(divide="ignore", invalid="ignore"):
        least = (1.0 - numbers) / weights
        likely = int(least.argmin())
        if math.isnan(least[likely]):
            # No wait at all of a token without weight.
            likely = int(np.nanargmin(least))
        bound = -np.log(numbers[likely]) / weights[likely]
        near = (least <= bound * (1 + 1e-9)).nonzero()[0]
        waits = -np.log(numbers[near]) / weights[near]
        first = int(waits.argmin())
        return int(near[first]), float(waits[first])
