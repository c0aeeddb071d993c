"""Places of requests in a cache whose slots lie side by side: which are in use, and what becomes of those that are not.

Slots are objects that their requests hold; the places that they are in may be exchanged for others at any time.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(eq=False)
class Place:
    """Place number `index` of a cache: its first `length` rows are committed."""

    index: int
    length: int = 0


class PlacedSlot:
    """A request's place in a cache, wherever that is moved to. See `Slot`. It is free when it is released; also when
    nothing refers to it any more, and then from the next time on that places are looked at.
    """

    def __init__(self, place: Place, dropped: deque[Place]) -> None:
        self.place = place
        self._drop = weakref.finalize(self, dropped.append, place)
        self._drop.atexit = False

    def drop(self) -> None:
        """Say that it is used no more, as its end does."""
        self._drop()

    @property
    def length(self) -> int:
        """The number of committed rows."""
        return self.place.length


class Places:
    """The places of a cache, by index; None for those that are free."""

    def __init__(self) -> None:
        self._places: list[Place | None] = []
        # A slot may end in any thread, and whatever the cache is doing.
        self._dropped: deque[Place] = deque()

    def __len__(self) -> int:
        """Return the number of places up to the last one in use."""
        return len(self._places)

    @property
    def used(self) -> list[Place]:
        """Those in use, by index."""
        return [place for place in self._places if place is not None]

    def at(self, index: int) -> Place | None:
        """Return the place in use at `index`, if there is one."""
        return self._places[index] if index < len(self._places) else None

    def new_slot(self) -> PlacedSlot:
        """Return a slot in the first place that is free."""
        index = next((index for index, place in enumerate(self._places) if place is None), len(self._places))
        if index == len(self._places):
            self._places.append(None)
        place = self._places[index] = Place(index)
        return PlacedSlot(place, self._dropped)

    def reap(self) -> list[int]:
        """Free the places whose slots are used no more; return their indexes."""
        found = []
        while self._dropped:
            found.append(self._dropped.popleft().index)
            self._places[found[-1]] = None
        self._trim()
        return found

    def exchange(self, one: int, other: int) -> None:
        """Let those at two indexes change places."""
        for index in (one, other):
            self._places += [None] * (index + 1 - len(self._places))
        mine, theirs = self._places[one], self._places[other]
        self._places[one], self._places[other] = theirs, mine
        if mine is not None:
            mine.index = other
        if theirs is not None:
            theirs.index = one
        self._trim()

    def compact(self) -> list[tuple[int, Place]]:
        """Close all holes; return those in use, in order, with the index that each had before."""
        moved = [(place.index, place) for place in self.used]
        self._places = [place for _, place in moved]
        for index, (_, place) in enumerate(moved):
            place.index = index
        return moved

    def moves(self, slots: Sequence[PlacedSlot], count: int) -> list[tuple[int, int]]:
        """Return the exchanges, one after the other, that bring `slots` among the first `count` places: those that are
        there stay where they are, and what makes way has the fewest rows.
        """
        wanted = {slot.place.index for slot in slots}
        free = [index for index in range(count) if index not in wanted]

        def rows(index: int) -> int:
            place = self.at(index)
            return -1 if place is None else place.length

        return list(zip(sorted(index for index in wanted if index >= count), sorted(free, key=rows), strict=False))

    def _trim(self) -> None:
        while self._places and self._places[-1] is None:
            self._places.pop()
