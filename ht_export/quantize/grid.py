"""Weights as whole numbers: grids for blocks of them along the input dimension, and how engines store those."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Weights along the input dimension that share a scale in `com.microsoft.MatMulNBits`: products of a row are the same
# bits in passes of any number of rows with this size, and not with larger ones.
BLOCK = 32


@dataclass(frozen=True)
class Grid:
    """Numbers that weights are rounded to: whole numbers of `bits` bits, times a scale for each block of `block`
    weights along the input dimension (None: for all of them).

    Unless the grid is `symmetric` each block has a zero point too, so that it goes from its least to its largest
    weight. Zero is on every grid. Scales are numbers of the precision that they are `stored` in.
    """

    bits: int
    block: int | None = BLOCK
    symmetric: bool = False
    stored: type[np.floating] = np.float32

    @property
    def ends(self) -> tuple[int, int]:
        """The least and the largest whole number."""
        largest = 2 ** (self.bits - 1) - 1
        return (-largest, largest) if self.symmetric else (0, 2**self.bits - 1)

    def fit(self, values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Return scales, their inverses and zero points [...] of the grids that hold all of values [..., n].

        A weight w becomes the whole number w / scale + zero point. Scale and inverse of a block of
        nothing but zeros are 0.
        """
        least, largest = self.ends
        low, high = values.min(axis=-1).clip(max=0), values.max(axis=-1).clip(min=0)
        if self.symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales = ((high - low) / np.float32(largest - least)).astype(self.stored).astype(np.float32)
        usable = scales > np.finfo(np.float32).tiny
        inverse = np.divide(1, scales, out=np.zeros_like(scales), where=usable)
        return scales, inverse, np.zeros_like(low) if self.symmetric else np.rint(-low * inverse)

    def in_blocks(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a copy of weights [N, K] in C blocks [N, C, block], the last filled up with zeros."""
        rows, columns = weights.shape
        width = self.block or columns
        blocks = -(-columns // width)
        values = np.zeros((rows, blocks * width), dtype=np.float32)
        values[:, :columns] = weights
        return values.reshape(rows, blocks, width)

    def rounded(
        self, weights: NDArray[np.float32], ends: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Return the whole numbers [N, C, block] of weights [N, K], scales and zero points [N, C]. The grid of each
        block holds the values of `ends` there, or the weights themselves.
        """
        values = self.in_blocks(weights)
        scales, inverse, zero_points = self.fit(values if ends is None else self.in_blocks(ends))
        # In place, for the head of a large model is large.
        values *= inverse[..., None]
        values += zero_points[..., None]
        np.rint(values, out=values).clip(*self.ends, out=values)
        return values, scales, zero_points


def packed_blocks(
    weights: NDArray[np.float32], bits: int, ends: NDArray[np.float32] | None = None
) -> tuple[NDArray, NDArray, NDArray]:
    """Return weights [N, K] as `MatMulNBits` has them, with C blocks of 32, the last filled up with zeros. The grid of
    each block goes from the least to the largest value of `ends` there, or of the weights themselves.

    These are bytes [N, C, 32 bits / 8], scales [N, C] and zero points [N, C bits / 8], of 4 bits two in a byte.
    """
    values, scales, zero_points = Grid(bits).rounded(weights, ends)
    return _packed(values.astype(np.uint8), bits), scales, _packed(zero_points.astype(np.uint8), bits)


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return values of 4 bits two in a byte, the first of them in its lower half."""
    if bits == 8:
        return values
    odd = values.shape[-1] % 2
    even = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, odd)]) if odd else values
    return even[..., ::2] | even[..., 1::2] << np.uint8(4)
