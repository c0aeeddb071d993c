"""The cache of accepted rows on a GPU."""

from __future__ import annotations

import weakref

from runtime.bindings import BYTES, GraphDims
from runtime.engines.cuda import Cuda, DeviceMemory
from runtime.engines.protocol import Kept, Slot
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
        self.memory = memory
        self.length = 0
        self.capacity = memory.capacity_for(0)
        self.start = memory.of(self.capacity).address
        memory.newest = weakref.ref(self)

    def check_newest(self) -> None:
        """Raise `InputError` when another cache of the engine was begun since: its rows are where ours were."""
        if self.memory.newest is None or self.memory.newest() is not self:
            raise InputError(
                "another text was begun on this engine before this one ended, and on a GPU it holds one at a time; "
                "use a Generator for each"
            )

    def addresses(self, layer: int) -> tuple[int, int]:
        """Return the addresses of the keys and values [Hkv, S, D] of `layer`."""
        size = self.memory.array_bytes(self.capacity)
        return self.start + 2 * layer * size, self.start + (2 * layer + 1) * size

    def reserve(self, rows: int) -> None:
        """Have room for `rows` more rows; enqueue the copy of those there are where they move."""
        needed = self.length + rows
        if needed <= self.capacity:
            return
        memory = self.memory
        capacity = memory.capacity_for(needed)
        start = memory.of(capacity).address
        row = memory.row_bytes
        memory.cuda.copy_rows(
            start,
            capacity * row,
            self.start,
            self.capacity * row,
            self.length * row,
            memory.arrays * memory.kv_heads,
        )
        self.start, self.capacity = start, capacity


class DeviceRows:
    """Copies of the first `length` rows of a cache, in device memory of their own."""

    def __init__(self, cache: DeviceCache, length: int) -> None:
        self.length = length
        memory = cache.memory
        self._memory = memory.cuda.allocate(memory.arrays * memory.array_bytes(length))
        self._copy(cache, to_cache=False)

    def restore(self, cache: DeviceCache, rows: int) -> None:
        """Enqueue the copy of the first `rows` rows into `cache`, which is empty."""
        cache.reserve(rows)
        self._copy(cache, to_cache=True, rows=rows)
        cache.length = rows

    def _copy(self, cache: DeviceCache, *, to_cache: bool, rows: int | None = None) -> None:
        memory = cache.memory
        row = memory.row_bytes
        mine = (self._memory.address, self.length * row)
        theirs = (cache.start, cache.capacity * row)
        target, source = (theirs, mine) if to_cache else (mine, theirs)
        width = (self.length if rows is None else rows) * row
        memory.cuda.copy_rows(*target, *source, width, memory.arrays * memory.kv_heads)


class DeviceCacheEngine:
    """What engines whose cache is a `DeviceCache` have in common."""

    dims: GraphDims
    packs = False
    _cuda: Cuda
    _cache_memory: CacheMemory

    @property
    def row_bytes(self) -> int:
        """See `Engine.row_bytes`."""
        return self.dims.row_bytes

    @property
    def gpu_name(self) -> str:
        """The GPU that passes run on."""
        return self._cuda.name

    def new_slot(self) -> DeviceCache:
        """See `Engine.new_slot`. Only the newest one may be used: all share one memory."""
        self._cuda.use()
        return DeviceCache(self._cache_memory)

    def keep(self, slot: Slot, rows: int) -> DeviceRows:
        """See `Engine.keep`."""
        self._cuda.use()
        return DeviceRows(cache_of(slot), rows)

    def copy(self, source: Slot | Kept, target: Slot, rows: int) -> None:
        """See `Engine.copy`."""
        assert isinstance(source, DeviceRows), "there is one slot at a time"
        self._cuda.use()
        source.restore(cache_of(target), rows)

    def release(self, slot: Slot) -> None:
        """See `Engine.release`: the memory is that of the next slot."""
        assert isinstance(slot, DeviceCache), "a slot of another engine"


def cache_of(slot: Slot) -> DeviceCache:
    """Return the cache that a slot of an engine on a GPU is. Raises `InputError` when it is not the newest."""
    assert isinstance(slot, DeviceCache), "a slot of another engine"
    slot.check_newest()
    return slot
