"""Accounts of slots that all have the same room, as those on a GPU do."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from runtime.engines.device_cache import CacheBudget
from runtime.scheduling.pool import CachePool


@dataclass(eq=False)
class Rows:
    length: int = 0


def test_slots_take_the_room_of_the_longest_in_a_power_of_two_of_places() -> None:
    budget = CacheBudget(4000, 64, 8, 1000)
    pool = CachePool(budget.rows, budget.footprint)
    slots = [Rows() for _ in range(4)]
    for slot in slots[:3]:
        assert pool.has_room(100)
        pool.admit(slot)
        assert pool.reserve(slot, 100)
    # Three are in four places of 256 rows.
    assert pool.reserved == 4 * 256
    assert pool.reserve(slots[0], 600)
    assert pool.reserved == 4 * 1000
    # A fourth is for nothing, and there is no room for what is kept.
    pool.admit(slots[3])
    assert pool.reserved == 4 * 1000
    assert not pool.has_room(1)
    kept = Rows()
    pool.admit(kept, kept=True)
    assert not pool.reserve(kept, 16)
    pool.close(slots[0])
    assert pool.reserved == 4 * 256
    assert pool.reserve(kept, 100)
    assert pool.reserved == 4 * 256 + 112
    pool.check([*slots[1:], kept])


@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.sampled_from(["admit", "keep", "reserve", "close"]), st.integers(0, 9), st.integers(0, 900))),
)
def test_no_more_is_ever_reserved_than_there_is(most: int, steps: list[tuple[str, int, int]]) -> None:
    budget = CacheBudget(3000, 64, most, 800)
    pool = CachePool(budget.rows, budget.footprint)
    held: list[Rows] = []
    for what, index, rows in steps:
        if what == "admit" and pool.has_room(rows):
            held.append(Rows())
            pool.admit(held[-1])
            # It has room for what it was let in for.
            assert pool.reserve(held[-1], rows)
        elif what == "keep":
            held.append(Rows())
            pool.admit(held[-1], kept=True)
        elif held and what == "reserve":
            slot = held[index % len(held)]
            if pool.reserve(slot, rows):
                slot.length = max(slot.length, rows)
        elif held and what == "close":
            pool.close(held.pop(index % len(held)))
        pool.check(held)
