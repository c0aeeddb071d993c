"""The cache of the CPU's engine against a plain list of rows for each request."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from runtime.bindings import GraphDims
from runtime.engines import dense_cache as module
from runtime.engines import places
from runtime.engines.dense_cache import BLOCK, DenseCache, KeptRows
from runtime.engines.places import PlacedSlot

DIMS = GraphDims(3, 4, 2, 5, 20, 50, (2,))
# Whole pages of every layer are those of one slot.
WHOLE_PAGES = GraphDims(2, 4, 2, 64, 256, 50, (1,))
Row = NDArray[np.float32]


def row_of(number: int) -> Row:
    """Return a row's keys and values [2, L, Hkv, D], none of them zero, and no others' for another number."""
    count = 2 * DIMS.num_layers * DIMS.key_value_heads * DIMS.head_dim
    values = np.linspace(number + 1, number + 1.9, count, dtype=np.float32)
    return values.reshape(2, DIMS.num_layers, DIMS.key_value_heads, DIMS.head_dim)


def write(cache: DenseCache, slot: PlacedSlot, rows: list[Row]) -> None:
    """Write the rows of a pass behind the committed ones, as engines do."""
    cache.reserve(slot.length, len(rows))
    for place, row in enumerate(rows, start=slot.length):
        cache.of(slot)[..., place, :] = row


def append(cache: DenseCache, slot: PlacedSlot, rows: list[Row]) -> None:
    """Write rows and commit all."""
    write(cache, slot, rows)
    cache.commit(slot, range(len(rows)), len(rows))


def contents(cache: DenseCache, slot: PlacedSlot) -> list[Row]:
    return list(np.moveaxis(cache.of(slot)[..., : slot.length, :], -2, 0))


def assert_holds(cache: DenseCache, slot: PlacedSlot, expected: list[Row]) -> None:
    assert slot.length == len(expected) <= cache.capacity
    if expected:
        np.testing.assert_array_equal(contents(cache, slot), expected)


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let caches grow often."""
    with mock.patch.object(module, "BLOCK", 8):
        yield


class AnyUse(RuleBasedStateMachine):
    """Requests come, grow, are copied and go, in any order; beside the cache, lists have what it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = DenseCache(DIMS)
        self.requests: list[tuple[PlacedSlot, list[Row]]] = []
        self.kept: list[tuple[KeptRows, list[Row]]] = []
        self.numbers = iter(range(1 << 30))

    def pick(self, data: st.DataObject) -> tuple[PlacedSlot, list[Row]]:
        return self.requests[data.draw(st.integers(0, len(self.requests) - 1))]

    def new_rows(self, count: int) -> list[Row]:
        return [row_of(next(self.numbers)) for _ in range(count)]

    @initialize(count=st.integers(0, 4))
    def begin(self, count: int) -> None:
        for _ in range(count):
            self.new_slot()

    @precondition(lambda self: len(self.requests) < 9)
    @rule()
    def new_slot(self) -> None:
        slot = self.cache.new_slot()
        assert slot.length == 0
        assert not self.cache.of(slot).any()
        self.requests.append((slot, []))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), most=st.integers(1, 30))
    def run_pass(self, data: st.DataObject, most: int) -> None:
        """One of several requests, of which some accept a few of their rows, in any order, and some none."""
        chosen = data.draw(st.permutations(range(len(self.requests))))[: data.draw(st.integers(1, 4))]
        self.arrange(chosen, data.draw(st.integers(0, 2)))
        written = {}
        for index in chosen:
            slot, _ = self.requests[index]
            written[index] = self.new_rows(data.draw(st.integers(1, most)))
        longest = max(self.requests[index][0].length for index in chosen)
        self.cache.reserve(longest, max(map(len, written.values())))
        for index, rows in written.items():
            write(self.cache, self.requests[index][0], rows)
        for index, rows in written.items():
            slot, expected = self.requests[index]
            accepted = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1))))
            self.cache.commit(slot, accepted, len(rows))
            expected.extend(rows[row] for row in accepted)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), rows=st.integers(0, 40))
    def reserve(self, data: st.DataObject, rows: int) -> None:
        slot, _ = self.pick(data)
        before = self.cache.capacity
        self.cache.reserve(slot.length, rows)
        assert self.cache.capacity >= max(before, slot.length + rows)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        slot, expected = self.pick(data)
        rows = data.draw(st.integers(0, slot.length))
        kept = self.cache.keep(slot, rows)
        assert kept.length == rows
        self.kept.append((kept, expected[:rows]))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1)))

    @precondition(lambda self: len(self.requests) < 9 and (self.kept or self.requests))
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        # By number, or what was drawn would be referred to for longer.
        number = data.draw(st.integers(0, len(self.kept) + len(self.requests) - 1))
        there: list[tuple[PlacedSlot | KeptRows, list[Row]]] = [*self.kept, *self.requests]
        source, expected = there[number]
        del there
        rows = data.draw(st.integers(0, source.length))
        target = self.cache.new_slot()
        self.cache.copy(source, target, rows)
        self.requests.append((target, expected[:rows]))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), dropped=st.booleans())
    def release(self, data: st.DataObject, dropped: bool) -> None:
        slot, _ = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        if not dropped:
            self.cache.release(slot)
            self.cache.release(slot)
        del slot

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), gaps=st.integers(0, 4))
    def put_together(self, data: st.DataObject, gaps: int) -> None:
        chosen = data.draw(st.sets(st.integers(0, len(self.requests) - 1), min_size=1))
        self.arrange(sorted(chosen), gaps)

    def arrange(self, chosen: list[int], gaps: int) -> None:
        slots = [self.requests[index][0] for index in chosen]
        spread = {slot.place.index for slot in slots}
        before = {id(slot): slot.place.index for slot, _ in self.requests}
        first, count = self.cache.arrange(slots, gaps)
        found = {slot.place.index for slot in slots}
        assert (first, count) == (min(found), max(found) + 1 - min(found))
        assert count <= len(slots) + gaps
        if max(spread) + 1 - min(spread) <= len(slots) + gaps:
            assert before == {id(slot): slot.place.index for slot, _ in self.requests}
        # Nobody goes further back than those that run.
        assert max(found) <= max(spread)

    @invariant()
    def every_request_has_its_rows(self) -> None:
        for slot, expected in self.requests:
            assert_holds(self.cache, slot, expected)
        for kept, expected in self.kept:
            assert kept.length == len(expected)
            if expected:
                np.testing.assert_array_equal(np.moveaxis(kept.arrays, -2, 0), expected)

    @invariant()
    def every_request_has_a_place_of_its_own(self) -> None:
        places = [slot.place.index for slot, _ in self.requests]
        assert len(set(places)) == len(places) == self.cache.in_use
        assert max(places, default=-1) < max(self.cache.arrays.shape[2], 1)
        for slot, expected in self.requests:
            assert self.cache.length_at(slot.place.index) == len(expected)
        for index in set(range(12)) - set(places):
            assert self.cache.length_at(index) == 0
            if index < self.cache.arrays.shape[2]:
                assert not self.cache.arrays[:, :, index].any(), "a free place is all zero"


def test_any_use_leaves_each_request_the_rows_that_a_list_has() -> None:
    run_state_machine_as_test(AnyUse, settings=settings(max_examples=50, stateful_step_count=25, deadline=None))


def test_places_and_rows_grow_as_they_must_and_seldom() -> None:
    cache = DenseCache(DIMS)
    assert (cache.arrays.shape[2], cache.capacity, cache.arrays.size) == (0, 0, 0)
    slots = []
    shapes = {cache.arrays.shape}
    for number in range(100):
        slots.append(cache.new_slot())
        shapes.add(cache.arrays.shape)
        assert number < cache.arrays.shape[2] <= max(1, 2 * number)
    assert len(shapes) <= 9
    append(cache, slots[50], [row_of(0)])
    grown = 0
    for _ in range(3000):
        before = cache.capacity
        cache.reserve(slots[0].length, 12)
        grown += cache.capacity != before
        assert cache.capacity <= 1.25 * (slots[0].length + 12) + module.BLOCK
        slots[0].place.length += 1
    assert grown < 25
    assert_holds(cache, slots[50], [row_of(0)])


def test_one_request_has_room_for_one() -> None:
    cache = DenseCache(DIMS)
    for _ in range(5):
        slot = cache.new_slot()
        append(cache, slot, [row_of(1)])
        assert (slot.place.index, cache.arrays.shape[2]) == (0, 1)
        cache.release(slot)


def test_a_slot_is_free_when_nothing_refers_to_it_and_is_used_again() -> None:
    cache = DenseCache(DIMS)
    slots = [cache.new_slot() for _ in range(4)]
    append(cache, slots[1], [row_of(7)])
    slots[1] = slots[3]
    gc.collect()
    assert cache.in_use == 3
    again = cache.new_slot()
    assert (again.place.index, again.length) == (1, 0)
    assert not cache.of(again).any()


def test_a_cache_does_not_keep_its_slots_nor_does_memory_outlive_both() -> None:
    cache = DenseCache(DIMS)
    slot = cache.new_slot()
    append(cache, slot, [row_of(1)])
    memory = weakref.ref(cache.arrays)
    del cache
    slot.drop()
    del slot
    gc.collect()
    assert memory() is None


def test_arranging_moves_the_last_ones_into_the_gaps() -> None:
    cache = DenseCache(DIMS)
    slots = [cache.new_slot() for _ in range(8)]
    for number, slot in enumerate(slots):
        append(cache, slot, [row_of(number)] * (number + 1))
    # As they are, with the gaps that may be.
    assert cache.arrange([slots[1], slots[3], slots[4]], 1) == (1, 4)
    assert [slot.place.index for slot in slots] == list(range(8))
    # The last one into the gap; what was there into its place.
    assert cache.arrange([slots[1], slots[3], slots[4]], 0) == (1, 3)
    assert [slots[index].place.index for index in (1, 2, 3, 4)] == [1, 4, 3, 2]
    for number, slot in enumerate(slots):
        assert_holds(cache, slot, [row_of(number)] * (number + 1))
    # Into free places too, which move to the end and go.
    for index in (0, 2, 5, 6):
        cache.release(slots[index])
    first, count = cache.arrange([slots[7], slots[4]], 0)
    assert {slots[7].place.index, slots[4].place.index} == {first, first + 1}
    assert count == 2
    for number in (1, 3, 4, 7):
        assert_holds(cache, slots[number], [row_of(number)] * (number + 1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_overflowed_do_not_stay_behind(value: float) -> None:
    cache = DenseCache(DIMS)
    slot = cache.new_slot()
    append(cache, slot, [row_of(0)])
    overflowed = row_of(3)
    overflowed[:, 1:] = value
    write(cache, slot, [row_of(1), row_of(2), overflowed])
    cache.commit(slot, [1], 3)
    assert_holds(cache, slot, [row_of(0), row_of(2)])
    assert np.isfinite(cache.arrays).all()


def resident_bytes(cache: DenseCache) -> int:
    """Return how much of the cache's memory is there, as Linux tells it of each part of this process's."""
    address, inside = cache.arrays.ctypes.data, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the cache is in no part of the memory")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is counted as Linux tells it")
def test_memory_is_taken_as_it_is_used_and_given_back_on_release(monkeypatch: pytest.MonkeyPatch) -> None:
    # Room that shrinks would be other memory.
    monkeypatch.setattr(module, "SPARE", 1 << 30)
    cache = DenseCache(WHOLE_PAGES)
    slots = [cache.new_slot() for _ in range(16)]
    cache.reserve(0, 1 << 18)
    # 8 GiB, of which nothing was written.
    assert cache.arrays.nbytes == 1 << 33
    before = resident_bytes(cache)
    assert before < 1 << 20
    half = 1 << 13
    for slot in slots[:4]:
        cache.of(slot)[..., :half, :] = 1.0
        cache.commit(slot, range(half), half)
    written = 4 * half * WHOLE_PAGES.row_bytes
    assert resident_bytes(cache) - before == written
    # What moves leaves nothing behind.
    cache.arrange([slots[3], slots[15]], 0)
    cache.release(slots[9])
    cache.arrange([slots[0], slots[15]], 0)
    assert resident_bytes(cache) - before == written
    for slot in slots:
        cache.release(slot)
    assert resident_bytes(cache) == before
    again = cache.new_slot()
    assert not cache.of(again)[..., : 2 * half, :].any()


def test_more_memory_than_there_can_be_is_an_error_that_says_how_much() -> None:
    cache = DenseCache(WHOLE_PAGES)
    cache.new_slot()
    with pytest.raises(MemoryError, match=r"no room for a cache of 1 slots of \d+ rows, \d+ MiB \("):
        cache.reserve(0, 1 << 50)
    # As it was.
    assert cache.capacity == 0
    assert cache.new_slot().length == 0


def test_slots_that_end_while_a_slot_is_made_harm_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector of garbage may end a slot at any allocation."""
    cache = DenseCache(DIMS)
    ending = [cache.new_slot() for _ in range(3)]
    place = places.Place

    def ends_others(index: int) -> object:
        ending.clear()
        gc.collect()
        return place(index)

    monkeypatch.setattr(places, "Place", ends_others)
    slot = cache.new_slot()
    monkeypatch.undo()
    append(cache, slot, [row_of(1), row_of(2)])
    assert cache.in_use == 1
    other = cache.new_slot()
    append(cache, other, [row_of(3)])
    assert_holds(cache, slot, [row_of(1), row_of(2)])
    assert_holds(cache, other, [row_of(3)])


def test_others_do_not_pay_for_a_long_request_once_it_has_ended() -> None:
    cache = DenseCache(DIMS)
    short, long = cache.new_slot(), cache.new_slot()
    append(cache, short, [row_of(1), row_of(2)])
    for start in range(0, 40 * BLOCK, BLOCK):
        append(cache, long, [row_of(start + place) for place in range(BLOCK)])
    assert cache.capacity >= 40 * BLOCK
    cache.release(long)
    assert cache.capacity <= 2 * BLOCK
    assert_holds(cache, short, [row_of(1), row_of(2)])
    # With nobody there is nothing to pay for, and room that the next one may need.
    before = cache.capacity
    cache.release(short)
    assert cache.capacity == before
