"""The cache of an engine on the CPU: the slots of all requests side by side, in memory that is taken as it is used.

Passes read and write it where it is. Requests that run together must be neighbours; those that are not are moved, or
what lies between them takes part in the pass with one row of no meaning.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.bindings import GraphDims
from runtime.engines.places import PlacedSlot, Places
from runtime.engines.protocol import Slot

# The rows of a slot grow by blocks of so many: passes of several trees read all that there is room for.
BLOCK = 64
# The room that slots may have when a longer one has ended, in terms of the longest that is left.
SPARE = 2


@dataclass(eq=False)
class KeptRows:
    """Copies of committed rows: keys and values [2, L, Hkv, length, D]."""

    arrays: NDArray
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = self.arrays.shape[3]


class DenseCache:
    """Keys and values [2, L, P, Hkv, S, D] of up to P slots, of S rows each.

    P and S grow as they must, and S shrinks when a far longer slot has ended; then all rows are moved. Memory that was
    never written takes no room, and neither does that of slots that were released.
    """

    def __init__(self, dims: GraphDims) -> None:
        self._dims = dims
        self._places = Places()
        self.arrays, self._memory = self._allocate(0, 0)

    @property
    def capacity(self) -> int:
        """S, the rows that there is room for in each slot."""
        return self.arrays.shape[4]

    @property
    def used(self) -> list[int]:
        """The indexes of the slots in use."""
        self._reap()
        return [place.index for place in self._places.used]

    @property
    def in_use(self) -> int:
        """The number of slots in use."""
        return len(self.used)

    def new_slot(self) -> PlacedSlot:
        """Return an empty slot, the first that is free."""
        self._reap()
        slot = self._places.new_slot()
        index = slot.place.index
        if index >= self.arrays.shape[2]:
            # One is what most programs need.
            self._resize(max(index + 1, 2 * self.arrays.shape[2]) if index else 1, self.capacity)
        return slot

    def release(self, slot: PlacedSlot) -> None:
        """Free `slot`, which is used no more, and its memory. Where it was far longer than the others S shrinks: passes
        of several trees read all that there is room for.
        """
        slot.drop()
        self._reap()
        longest = max((place.length for place in self._places.used), default=self.capacity)
        if self.capacity > SPARE * (longest + BLOCK):
            self._resize(self.arrays.shape[2], self._rounded(longest + longest // 4))

    def _reap(self) -> None:
        """Free the places whose slots are used no more, and their memory."""
        for index in self._places.reap():
            self._forget(index)

    def reserve(self, length: int, rows: int) -> None:
        """Have room for `rows` more rows behind `length` ones. S grows by a quarter at least."""
        self._reap()
        needed = length + rows
        if needed > self.capacity:
            target = max(needed, self.capacity + self.capacity // 4)
            self._resize(self.arrays.shape[2], self._rounded(target))

    @staticmethod
    def _rounded(rows: int) -> int:
        return -(-rows // BLOCK) * BLOCK

    def commit(self, slot: PlacedSlot, rows: Sequence[int], written: int) -> None:
        """Accept `rows` of the `written` ones that the pass before has left behind the committed ones, in that order.

        Those that stay behind are made finite: attention may read them, with a weight of zero.
        """
        start = slot.length
        moved = [(place, row) for place, row in enumerate(rows) if place != row]
        if moved:
            places, sources = (start + np.array(side) for side in zip(*moved, strict=True))
            arrays = self.of(slot)
            arrays[..., places, :] = arrays[..., sources, :]
        slot.place.length = start + len(rows)
        behind = self.of(slot)[..., slot.length : start + written, :]
        # What overflows in a layer does so in all after it.
        if not np.isfinite(behind[:, -1]).all():
            behind[:] = 0

    def of(self, slot: PlacedSlot) -> NDArray:
        """Return the keys and values [2, L, Hkv, S, D] of `slot`, to read and to write."""
        return self.arrays[:, :, slot.place.index]

    def keep(self, slot: PlacedSlot, rows: int) -> KeptRows:
        """Return copies of the first `rows` rows of `slot`."""
        return KeptRows(self.of(slot)[..., :rows, :].copy())

    def copy(self, source: Slot | KeptRows, target: PlacedSlot, rows: int) -> None:
        """Commit the first `rows` rows of `source` to `target`, which is empty."""
        assert not target.length and rows <= source.length
        self.reserve(0, rows)
        if isinstance(source, KeptRows):
            found = source.arrays
        else:
            assert isinstance(source, PlacedSlot)
            found = self.of(source)
        self.of(target)[..., :rows, :] = found[..., :rows, :]
        target.place.length = rows

    def arrange(self, slots: Sequence[PlacedSlot], gaps: int) -> tuple[int, int]:
        """Move `slots` together until at most `gaps` others, or free places, are between them; return the index of the
        first and the number of places from there to the last.
        """
        wanted = {slot.place.index for slot in slots}
        while True:
            first, last = min(wanted), max(wanted)
            count = last - first + 1
            if count - len(wanted) <= gaps:
                return first, count
            hole = next(index for index in range(first, last) if index not in wanted)
            self._exchange(last, hole)
            wanted.remove(last)
            wanted.add(hole)

    def length_at(self, index: int) -> int:
        """Return the number of rows that are committed at a place, 0 where it is free."""
        place = self._places.at(index)
        return place.length if place else 0

    def _exchange(self, one: int, other: int) -> None:
        """Let those at two indexes change places; the first is in use."""
        mine, theirs = self._places.at(one), self._places.at(other)
        assert mine is not None
        here, there = self.arrays[:, :, one], self.arrays[:, :, other]
        if theirs is None:
            there[..., : mine.length, :] = here[..., : mine.length, :]
            self._forget(one)
        else:
            kept = here[..., : mine.length, :].copy()
            if theirs.length < mine.length:
                self._forget(one)
            here[..., : theirs.length, :] = there[..., : theirs.length, :]
            if mine.length < theirs.length:
                self._forget(other)
            there[..., : mine.length, :] = kept
        self._places.exchange(one, other)

    def _resize(self, places: int, capacity: int) -> None:
        before = self.arrays
        self.arrays, self._memory = self._allocate(places, capacity)
        for place in self._places.used:
            if place.length:
                at = (slice(None), slice(None), place.index, slice(None), slice(place.length))
                self.arrays[at] = before[at]

    def _allocate(self, places: int, capacity: int) -> tuple[NDArray, mmap.mmap | None]:
        dims = self._dims
        shape = (2, dims.num_layers, places, dims.key_value_heads, capacity, dims.head_dim)
        dtype = np.dtype(dims.dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        if not size:
            return np.zeros(shape, dtype=dtype), None
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        except OSError as error:
            raise MemoryError(
                f"no room for a cache of {places} slots of {capacity} rows, {size >> 20} MiB ({error.strerror})"
            ) from error
        return np.frombuffer(memory, dtype=dtype).reshape(shape), memory

    def _forget(self, index: int) -> None:
        """Give the memory of a place back: it is all zero then."""
        if self._memory is None or index >= self.arrays.shape[2]:
            return
        size = self.arrays[0, 0, 0].nbytes
        place = self.arrays.strides[2]
        data = np.frombuffer(self._memory, dtype=np.uint8)
        for layer in range(2 * self._dims.num_layers):
            start = layer * self.arrays.strides[1] + index * place
            end = start + size
            # Whole pages alone are given back: those at the edges belong to neighbours too.
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if first >= last:
                data[start:end] = 0
                continue
            data[start:first] = 0
            data[last:end] = 0
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)


# Pages are counted when they are written. Python names the flag from 3.12 on.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if hasattr(mmap, "MADV_DONTNEED") else 0)


def slot_of(slot: object) -> PlacedSlot:
    """Return the slot as one of this cache."""
    assert isinstance(slot, PlacedSlot), "a slot of another engine"
    return slot
