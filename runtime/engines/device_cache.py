"""The cache of accepted rows on a GPU."""

from __future__ import annotations

import weakref

from runtime.bindings import BYTES, GraphDims
from runtime.engines.cuda import Cuda, DeviceMemory
from runtime.engines.protocol import Slot
from runtime.errors import InputError

SMALLEST_CAPACITY = 256


def capacities(most: int) -> list[int]:
    """Return the capacities of caches, each twice the one before and the last the largest; all may be held at once."""
    found = [min(SMALLEST_CAPACITY, most)]
    while 4 * found[-1] <= most:
        found.append(2 * found[-1])
    return [*found, most] if found[-1] < most else found


class CacheMemory:
    """Device memory for caches, one for each capacity: passes of one capacity find it at the same addresses, as their
    captured graphs need. The `most` rows are the largest capacity.
    """

    def __init__(self, cuda: Cuda, dims: GraphDims, most: int) -> None:
        self.cuda = cuda
        self.most = most
        # The keys or values of one row, of one head.
        self.row_bytes = dims.head_dim * BYTES[dims.dtype]
        self.kv_heads = dims.key_value_heads
        self.arrays = 2 * dims.num_layers
        self._held: dict[int, DeviceMemory] = {}
        self.newest: weakref.ref[DeviceCache] | None = None

    def array_bytes(self, capacity: int) -> int:
        """Return the bytes of the keys, or the values, [Hkv, S, D] of one layer."""
        return self.kv_heads * capacity * self.row_bytes

    def of(self, capacity: int) -> DeviceMemory:
        """Return the memory of a cache of S = `capacity` rows. Raises `InputError` when there is too little."""
        if capacity not in self._held:
            self._held[capacity] = self.cuda.allocate(self.arrays * self.array_bytes(capacity))
        return self._held[capacity]

    def capacity_for(self, rows: int) -> int:
        """Return the capacity to hold so many rows: few different ones, each with its own passes."""
        return next(capacity for capacity in capacities(self.most) if capacity >= rows)


class DeviceCache:
    """Keys and values of accepted rows, the first `length` of `capacity` rows valid. See `Slot`.

    All caches of an engine share its memory: only the newest one may be used.
    """

    def __init__(self, memory: CacheMemory) -> None:
        self._memory = memory
        self.length = 0
        self.capacity = memory.capacity_for(0)
        self._start = memory.of(self.capacity).address
        memory.newest = weakref.ref(self)

    def check_newest(self) -> None:
        """Raise `InputError` when another cache of the engine was begun since: its rows are where ours were."""
        if self._memory.newest is None or self._memory.newest() is not self:
            raise InputError(
                "another text was begun on this engine before this one ended, and on a GPU it holds one at a time; "
                "use a Generator for each"
            )

    def addresses(self, layer: int) -> tuple[int, int]:
        """Return the addresses of the keys and values [Hkv, S, D] of `layer`."""
        size = self._memory.array_bytes(self.capacity)
        return self._start + 2 * layer * size, self._start + (2 * layer + 1) * size

    def reserve(self, rows: int) -> None:
        """Have room for `rows` more rows; enqueue the copy of those there are where they move."""
        needed = self.length + rows
        if needed <= self.capacity:
            return
        memory = self._memory
        capacity = memory.capacity_for(needed)
        start = memory.of(capacity).address
        row = memory.row_bytes
        memory.cuda.copy_rows(
            start,
            capacity * row,
            self._start,
            self.capacity * row,
            self.length * row,
            memory.arrays * memory.kv_heads,
        )
        self._start, self.capacity = start, capacity


def cache_of(slot: Slot) -> DeviceCache:
    """Return the cache that a slot of an engine on a GPU is. Raises `InputError` when it is not the newest."""
    assert isinstance(slot, DeviceCache), "a slot of another engine"
    slot.check_newest()
    return slot
