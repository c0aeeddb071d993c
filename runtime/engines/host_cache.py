"""Engines whose new keys and values come back to the host, and the cache that keeps the accepted ones."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.arrays import IntArray
from runtime.bindings import GraphDims
from runtime.engines.protocol import Batch, Kept, Result, Slot
from runtime.rows import HostOutputs, PickedRows

BLOCK = 64
# Slots that the memory of the host is the only limit of.
MANY = 1 << 20


class KeyValueCache:
    """Keys and values [L, 1, Hkv, S, D] of one request, the first `length` of S rows valid. See `Slot`.

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

    def append(self, keys: Sequence[NDArray], values: Sequence[NDArray], rows: Sequence[int]) -> None:
        """Append `rows` of L arrays of new keys and values [Hkv, R_l, D], in that order."""
        if not rows:
            return
        end = self.length + len(rows)
        if end > self.capacity:
            self._grow(end)
        # A slice where the rows allow it: a prompt's rows are all accepted, and copying them by index is slower.
        first, last = rows[0], rows[-1]
        index = slice(first, last + 1) if last - first + 1 == len(rows) else list(rows)
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.keys[layer, 0, :, self.length : end] = key[:, index]
            self.values[layer, 0, :, self.length : end] = value[:, index]
        self.length = end

    def first(self, rows: int) -> KeyValueCache:
        """Return a copy of the first `rows` rows."""
        found = copy.copy(self)
        found.length = rows
        found.keys, found.values = (array[:, :, :, :rows].copy() for array in (self.keys, self.values))
        return found

    def take(self, source: KeyValueCache, rows: int) -> None:
        """Commit the first `rows` rows of `source`; there are none yet."""
        assert not self.length and rows <= source.length
        self._grow(rows)
        self.keys[:, :, :, :rows] = source.keys[:, :, :, :rows]
        self.values[:, :, :, :rows] = source.values[:, :, :, :rows]
        self.length = rows

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


@dataclass(frozen=True)
class HostResult:
    """A pass whose outputs are all on the host: logits [B, M, V]; draft_logits [B, sum R_k, V_d] in row order;
    key_new and value_new L arrays [B, Hkv, R_l, D], the tree's rows first.

    `pseudo` [B] has for each request the rows of its own draft logits. See `Result`. Nothing of it is used again by a
    later pass.
    """

    batch: Batch
    logits: NDArray[np.float32]
    draft_logits: NDArray[np.float32]
    key_new: Sequence[NDArray]
    value_new: Sequence[NDArray]
    pseudo: tuple[IntArray, ...]

    def outputs(self, index: int) -> HostOutputs:
        """See `Result.outputs`."""
        rows = self.batch.rows[index]
        drafts = PickedRows(self.draft_logits[index], self.pseudo[index])
        return HostOutputs(rows, self.logits[index, : len(rows.logit_rows)], drafts)


class HostCacheEngine(ABC):
    """Base of the engines whose results are `HostResult`s."""

    dims: GraphDims
    max_batch: int
    max_slots = MANY
    gpu_name = None
    packs = False

    @abstractmethod
    def run(self, batch: Batch) -> HostResult:
        """See `Engine.run`."""

    @property
    def row_bytes(self) -> int:
        """See `Engine.row_bytes`."""
        return self.dims.row_bytes

    def new_slot(self) -> KeyValueCache:
        """See `Engine.new_slot`."""
        return KeyValueCache(self.dims)

    def keep(self, slot: Slot, rows: int) -> KeyValueCache:
        """See `Engine.keep`."""
        return cache_of(slot).first(rows)

    def copy(self, source: Slot | Kept, target: Slot, rows: int) -> None:
        """See `Engine.copy`."""
        cache_of(target).take(cache_of(source), rows)

    def release(self, slot: Slot) -> None:
        """See `Engine.release`: memory is freed with the slot."""
        cache_of(slot)

    def commit(self, result: Result, accepted: Sequence[Sequence[int]]) -> None:
        """See `Engine.commit`."""
        assert isinstance(result, HostResult), "a result of another engine"
        for index, (slot, rows) in enumerate(zip(result.batch.slots, accepted, strict=True)):
            keys, values = ([array[index] for array in kind] for kind in (result.key_new, result.value_new))
            cache_of(slot).append(keys, values, rows)


def cache_of(slot: Slot | Kept) -> KeyValueCache:
    """Return the cache that a slot of these engines is."""
    assert isinstance(slot, KeyValueCache), "a slot of another engine"
    return slot


def caches_of(batch: Batch) -> tuple[list[NDArray], list[NDArray]]:
    """Return the keys and the values that a pass of `batch` reads: L arrays [B, Hkv, S, D] each."""
    caches = [cache_of(slot) for slot in batch.slots]
    if len(caches) == 1:
        return list(caches[0].keys), list(caches[0].values)
    capacity = max(cache.capacity for cache in caches)
    keys, values = (
        [_together([getattr(cache, kind)[layer] for cache in caches], capacity) for layer in range(len(caches[0].keys))]
        for kind in ("keys", "values")
    )
    return keys, values


def _together(caches: Sequence[NDArray], capacity: int) -> NDArray:
    """Return [B, Hkv, S, D] of B caches [1, Hkv, S', D], S' up to S = `capacity`."""
    together = np.zeros((len(caches), caches[0].shape[1], capacity, caches[0].shape[3]), dtype=caches[0].dtype)
    for place, cache in zip(together, caches, strict=True):
        place[:, : cache.shape[2]] = cache[0]
    return together
