"""The cache of accepted rows: keys and values of every token that is certain, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.bindings import GraphDims
from runtime.engines import Outputs

BLOCK = 64


class KeyValueCache:
    """Keys and values [L, 1, Hkv, S, D] of one sequence, the first `length` of S rows valid.

    S grows by a block or an eighth, whichever is more, so that growing costs little over a text of any length while
    attention reads few rows that are not valid.
    """

    def __init__(self, dims: GraphDims) -> None:
        self.length = 0
        shape = (dims.num_layers, 1, dims.key_value_heads, 0, dims.head_dim)
        self.keys: NDArray = np.zeros(shape, dtype=dims.dtype)
        self.values: NDArray = np.zeros(shape, dtype=dims.dtype)

    @property
    def capacity(self) -> int:
        """S, the rows that there is memory for."""
        return self.keys.shape[3]

    def commit(self, outputs: Outputs, rows: Sequence[int]) -> None:
        """See `Cache.commit`."""
        end = self.length + len(rows)
        if end > self.capacity:
            self._grow(end)
        # A slice where the rows allow it: a prompt's rows are all accepted, and copying them by index is slower.
        first, last = rows[0], rows[-1]
        index = slice(first, last + 1) if last - first + 1 == len(rows) else list(rows)
        for layer, (key, value) in enumerate(zip(outputs.key_new, outputs.value_new, strict=True)):
            self.keys[layer, :, :, self.length : end] = key[:, :, index]
            self.values[layer, :, :, self.length : end] = value[:, :, index]
        self.length = end

    def _grow(self, needed: int) -> None:
        target = max(needed, self.capacity + max(BLOCK, self.capacity // 8))
        capacity = -(-target // BLOCK) * BLOCK
        self.keys = _widen(self.keys, self.length, capacity)
        self.values = _widen(self.values, self.length, capacity)


def _widen(array: NDArray, length: int, capacity: int) -> NDArray:
    layers, batch, heads, _, head_dim = array.shape
    wider = np.zeros((layers, batch, heads, capacity, head_dim), dtype=array.dtype)
    wider[:, :, :, :length] = array[:, :, :, :length]
    return wider
