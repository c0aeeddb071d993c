"""The cache of accepted rows on a GPU: the slots of all requests side by side, where passes read them in place.

The keys, and the values, of a layer are one array [P, Hkv, S, D] of P places of S rows. A pass over B requests reads
the first B places, so that its addresses are those of every such pass, as captured CUDA graphs need; S is the least of
few capacities that holds the longest request. P and S change where an array lies, not its address: only when P * S
outgrows all that there was before does it move.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.bindings import BYTES, GraphDims
from runtime.engines.cuda import Cuda, DeviceMemory, DeviceMemoryError
from runtime.engines.places import Place, PlacedSlot, Places
from runtime.engines.protocol import Kept, Slot
from runtime.errors import EngineError, InputError

SMALLEST_CAPACITY = 256


def capacities(most: int) -> list[int]:
    """Return the capacities of caches, each twice the one before and the last the largest."""
    found = [min(SMALLEST_CAPACITY, most)]
    while 4 * found[-1] <= most:
        found.append(2 * found[-1])
    return [*found, most] if found[-1] < most else found


def in_places(count: int, most: int) -> int:
    """Return the places of a pass of `count` requests: a power of two, or the `most` that there may be. There are few
    such numbers, each with passes of its own.
    """
    return min(1 << (count - 1).bit_length(), most)


@dataclass(frozen=True)
class CacheBudget:
    """The device memory for keys and values, as `rows` of `row_bytes` bytes: of kept rows, and of slots of up to
    `slot_rows` rows each, up to `most_slots` of them in a pass.
    """

    rows: int
    row_bytes: int
    most_slots: int
    slot_rows: int

    def capacity_for(self, rows: int) -> int:
        """Return the S of slots of which the longest has so many rows; the largest S for more."""
        found = capacities(self.slot_rows)
        return next((capacity for capacity in found if capacity >= rows), found[-1])

    def footprint(self, count: int, longest: int) -> int:
        """Return the rows that `count` slots take together, of which the longest has `longest` rows."""
        return self.places_for(count) * self.capacity_for(longest) if count else 0

    def places_for(self, count: int) -> int:
        """Return the places that there is memory for with `count` slots: as many as passes over them have."""
        return max(count, in_places(count, self.most_slots))


class DeviceCache:
    """Keys and values of the committed rows of all slots, within `budget`.

    Memory is taken as it is needed, and used again for whatever P and S are then. What lies behind the committed rows
    of a slot is zero: attention may read it, with a weight of zero, and of a request that failed not all is a number.
    """

    def __init__(self, cuda: Cuda, dims: GraphDims, budget: CacheBudget) -> None:
        self.budget = budget
        self._cuda = cuda
        # The keys or values of one row: of one head, and of all.
        self._head_row = dims.head_dim * BYTES[dims.dtype]
        self._heads = dims.key_value_heads
        self._row = self._heads * self._head_row
        self._arrays = 2 * dims.num_layers
        self._held: list[DeviceMemory] = []
        # The rows that each array has room for, of all places together.
        self._rows = 0
        self.capacity = budget.capacity_for(0)
        # Changes when the arrays are somewhere else.
        self.generation = 0
        self._places = Places()
        # A slot has ended since S was chosen.
        self._may_shrink = False
        self._kept: weakref.WeakSet[KeptDeviceRows] = weakref.WeakSet()

    @property
    def in_use(self) -> int:
        """The number of slots in use."""
        self._reap()
        return len(self._places.used)

    @property
    def bytes(self) -> int:
        """The device memory that is taken, by slots and by kept rows."""
        return (self._rows + sum(kept.length for kept in self._kept)) * self.budget.row_bytes

    def new_slot(self) -> PlacedSlot:
        """Return an empty slot: as many as there is memory for, though passes are over `most_slots` at most."""
        self._reap()
        slot = self._places.new_slot()
        size, start = self._start_of(1), self._start_of(slot.place.index)
        # Another slot was there, or was moved away. Memory that is new is zero.
        if start + size <= self._rows * self._row:
            for memory in self._held:
                self._cuda.clear(memory.address + start, size)
        return slot

    def release(self, slot: PlacedSlot) -> None:
        """Free `slot`, which is used no more."""
        slot.drop()
        self._reap()

    def arrange(
        self, slots: Sequence[PlacedSlot], more: Sequence[int], places: int, *, together: bool
    ) -> tuple[int, int]:
        """Have room for so many `more` rows in each of `slots`; return the first place of a pass over them, and how
        many places it has.

        Where they are `together` that is the first of all, and `places` of them; a single slot may stay where it is.
        Rows move by copies that are enqueued. Raises `InputError` where the budget does not allow it.
        """
        self._reap()
        self._fit(max(slot.length + rows for slot, rows in zip(slots, more, strict=True)), places)
        if not together:
            (slot,) = slots
            return slot.place.index, 1
        for one, other in self._places.moves(slots, places):
            self._exchange(one, other)
        return 0, places

    def addresses(self, layer: int, first: int = 0) -> tuple[int, int]:
        """Return the addresses of the keys and values [., Hkv, S, D] of `layer`, from place `first` on."""
        start = self._start_of(first)
        return self._held[2 * layer].address + start, self._held[2 * layer + 1].address + start

    def keep(self, slot: PlacedSlot, rows: int) -> KeptDeviceRows:
        """Return copies of the first `rows` rows of `slot`. Raises `InputError` when there is too little memory."""
        if self.bytes + rows * self.budget.row_bytes > self.budget.rows * self.budget.row_bytes:
            # Slots had more once than they need now.
            used = self._places.used
            longest = max((place.length for place in used), default=0)
            if (needed := self.budget.footprint(len(used), longest)) < self._rows:
                self._settle(self.budget.capacity_for(longest), needed)
            if (left := self.budget.rows * self.budget.row_bytes - self.bytes) < rows * self.budget.row_bytes:
                raise InputError(
                    f"{rows} rows to keep need {rows * self.budget.row_bytes} bytes of the GPU's memory, and "
                    f"gpu_memory_bytes leaves {left}; raise it, or keep less"
                )
        kept = KeptDeviceRows(self._cuda.allocate(rows * self.budget.row_bytes), rows)
        self._kept.add(kept)
        pitch = rows * self._head_row
        if rows:
            for array, held in enumerate(self._held):
                source = held.address + self._start_of(slot.place.index)
                self._copy_heads(kept.of(array, self._arrays), pitch, source, self._pitch, rows, self._heads)
        return kept

    def copy(self, source: PlacedSlot | KeptDeviceRows, target: PlacedSlot, rows: int) -> None:
        """Commit the first `rows` rows of `source` to `target`, which is empty: copies are enqueued."""
        assert not target.length and rows <= source.length
        self._reap()
        if not rows:
            return
        self._fit(rows, 1)
        for array, held in enumerate(self._held):
            there = held.address + self._start_of(target.place.index)
            if isinstance(source, KeptDeviceRows):
                here, pitch = source.of(array, self._arrays), source.length * self._head_row
            else:
                here, pitch = held.address + self._start_of(source.place.index), self._pitch
            self._copy_heads(there, self._pitch, here, pitch, rows, self._heads)
        target.place.length = rows

    @property
    def _pitch(self) -> int:
        """The bytes from one head to the next."""
        return self.capacity * self._head_row

    def _start_of(self, index: int, capacity: int | None = None) -> int:
        """Return where in an array of S = `capacity` a place begins."""
        return index * (self.capacity if capacity is None else capacity) * self._row

    def _copy_heads(
        self, target: int, target_pitch: int, source: int, source_pitch: int, rows: int, heads: int
    ) -> None:
        self._cuda.copy_rows(target, target_pitch, source, source_pitch, rows * self._head_row, heads)

    def _reap(self) -> None:
        self._may_shrink |= bool(self._places.reap())

    def _fit(self, needed: int, places: int) -> None:
        """Have room for `places` places at least, and in each for `needed` rows. Raises `InputError` beyond the budget.

        S becomes less only once a slot has ended: passes of several sizes would change it at every step.
        """
        longest = max([needed, *(place.length for place in self._places.used)])
        if longest > self.budget.slot_rows:
            raise InputError(
                f"{longest} rows of one request are more than the {self.budget.slot_rows} that there is memory for; "
                "raise gpu_memory_bytes, or use a shorter context"
            )
        capacity = self.budget.capacity_for(longest)
        if capacity < self.capacity and not self._may_shrink:
            capacity = self.capacity
        self._may_shrink = False
        if capacity == self.capacity and max(places, len(self._places)) * capacity <= self._rows:
            return
        # Nothing is moved for places beyond the last one in use.
        count = max(places, len(self._places.used))
        room = self.budget.rows - sum(kept.length for kept in self._kept)
        if count * capacity > room:
            raise InputError(
                f"{count} requests of up to {capacity} rows each need {count * capacity * self.budget.row_bytes} bytes "
                f"of the GPU's memory, and gpu_memory_bytes leaves {room * self.budget.row_bytes}; raise it, or run "
                "fewer at once"
            )
        self._settle(capacity, max(self._rows, min(self.budget.places_for(count) * capacity, room)))

    def _settle(self, capacity: int, rows: int) -> None:
        """Lay all slots out anew, without holes, in places of S = `capacity`, in arrays of `rows` rows. Raises
        `EngineError` where there is too little memory, and then some of the rows are lost.
        """
        try:
            self._move(capacity, rows)
        except DeviceMemoryError as error:
            raise EngineError(f"the engine failed: {error}") from error

    def _move(self, capacity: int, rows: int) -> None:
        moved = self._places.compact()
        if rows != self._rows:
            self.generation += 1
            before = deque(self._held if any(place.length for _, place in moved) else ())
            self._held = []
            for _ in range(self._arrays):
                # One array after the other, so that no more than one of them is there twice.
                source = before.popleft() if before else None
                target = self._cuda.allocate(rows * self._row)
                if source is not None:
                    self._lay_out(moved, source.address, target.address, capacity)
                self._held.append(target)
            self._rows = rows
        elif moved:
            # In the same memory the old layout and the new one overlap. Behind the rows there are zeros then, too.
            size = self._start_of(len(moved), capacity)
            aside = self._cuda.allocate(size)
            for memory in self._held:
                self._lay_out(moved, memory.address, aside.address, capacity)
                self._cuda.copy(memory.address, aside.address, size)
        self.capacity = capacity

    def _lay_out(self, moved: Sequence[tuple[int, Place]], source: int, target: int, capacity: int) -> None:
        """Enqueue the copies of one array into places of S = `capacity`."""
        pitch = capacity * self._head_row
        for index, place in moved:
            there = target + self._start_of(place.index, capacity)
            self._copy_heads(there, pitch, source + self._start_of(index), self._pitch, place.length, self._heads)

    def _exchange(self, one: int, other: int) -> None:
        """Let those at two places change them, with all that lies behind their rows; the first is in use."""
        mine, theirs = self._places.at(one), self._places.at(other)
        assert mine is not None
        here, there, size = self._start_of(one), self._start_of(other), self._start_of(1)
        aside = self._cuda.allocate(size) if theirs is not None else None
        for memory in self._held:
            source, target = memory.address + here, memory.address + there
            if aside is not None:
                self._cuda.copy(aside.address, target, size)
            self._cuda.copy(target, source, size)
            if aside is not None:
                self._cuda.copy(source, aside.address, size)
        self._places.exchange(one, other)


class KeptDeviceRows:
    """Copies of the first `length` rows of a slot [2L, Hkv, length, D], in device memory of their own."""

    def __init__(self, memory: DeviceMemory, length: int) -> None:
        self.length = length
        self._memory = memory

    def of(self, array: int, arrays: int) -> int:
        """Return the address of one of the arrays, of so many in all."""
        return self._memory.address + array * (self._memory.size // arrays)


def slot_of(slot: Slot) -> PlacedSlot:
    """Return the slot as one of an engine on a GPU."""
    assert isinstance(slot, PlacedSlot), "a slot of another engine"
    return slot


def source_of(source: Slot | Kept) -> PlacedSlot | KeptDeviceRows:
    """Return what rows are copied from, a slot or kept rows of an engine on a GPU."""
    assert isinstance(source, (PlacedSlot, KeptDeviceRows)), "rows of another engine"
    return source
