"""Weights in blocks of 32 along the input dimension, as `com.microsoft.MatMulNBits` stores them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 32


def grids(ends: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return scales, their inverses and zero points [...] of the grids from the least to the largest of ends [..., n].

    Zero is on every grid. A weight w becomes the whole number w / scale + zero point. Of blocks of nothing but zeros
    scale and inverse are 0.
    """
    low, high = ends.min(axis=-1).clip(max=0), ends.max(axis=-1).clip(min=0)
    scales = (high - low) / np.float32(2**bits - 1)
    usable = scales > np.finfo(np.float32).tiny
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=usable)
    return scales, inverse, np.rint(-low * inverse)


def blockwise(
    weights: NDArray[np.float32], bits: int, ends: NDArray[np.float32] | None = None
) -> tuple[NDArray, NDArray, NDArray]:
    """Return weights [N, K] as `MatMulNBits` has them, with C blocks of 32, the last filled up with zeros. The grid of
    each block goes from the least to the largest value of `ends` there, or of the weights themselves.

    These are bytes [N, C, 32 bits / 8], scales [N, C] and zero points [N, C bits / 8], of 4 bits two in a byte.
    """
    rows, columns = weights.shape
    blocks = -(-columns // BLOCK)

    def in_blocks(array: NDArray[np.float32]) -> NDArray[np.float32]:
        values = np.zeros((rows, blocks * BLOCK), dtype=np.float32)
        values[:, :columns] = array
        return values.reshape(rows, blocks, BLOCK)

    values = in_blocks(weights)
    grid = values if ends is None else in_blocks(ends)
    scales, inverse, zero_points = grids(grid, bits)
    # In place, for the head of a large model is large.
    values *= inverse[..., None]
    values += zero_points[..., None]
    np.rint(values, out=values).clip(0, 2**bits - 1, out=values)
    return _packed(values.astype(np.uint8), bits), scales, _packed(zero_points.astype(np.uint8), bits)


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return values of 4 bits two in a byte, the first of them in its lower half."""
    if bits == 8:
        return values
    odd = values.shape[-1] % 2
    even = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, odd)]) if odd else values
    return even[..., ::2] | even[..., 1::2] << np.uint8(4)
