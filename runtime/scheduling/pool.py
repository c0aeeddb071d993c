"""Accounts for the memory of an engine's cache: the rows that each slot has committed, and those reserved for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

# Rows are reserved in blocks of so many.
BLOCK = 16

# Returns the rows that so many slots take together, of which the longest has so many reserved.
Footprint = Callable[[int, int], int]


class HasLength(Protocol):
    """Anything that keeps rows, `length` of them."""

    @property
    def length(self) -> int:
        """The number of committed rows."""
        ...


@dataclass
class Account:
    """What a slot, or rows that are `kept`, take: `reserved` rows. The slot itself says how many are committed."""

    slot: HasLength
    reserved: int = 0
    kept: bool = False


class CachePool:
    """The `rows` that all slots of an engine, and the rows that are kept, may take together.

    Nothing is written into a slot beyond what is reserved for it, and what is reserved never exceeds `rows`. Slots take
    what is reserved for them, or, where all of them have the same room, as their `footprint` says.
    """

    def __init__(self, rows: int, footprint: Footprint | None = None) -> None:
        self.rows = rows
        self._footprint = footprint
        self._accounts: dict[int, Account] = {}
        self._reserved = 0
        self.most_reserved = 0

    @property
    def reserved(self) -> int:
        """The rows that are reserved for all slots together."""
        return self._reserved

    @property
    def free(self) -> int:
        """The rows that may still be reserved, by what is kept."""
        return self.rows - self._reserved

    def __len__(self) -> int:
        return len(self._accounts)

    def has_room(self, rows: int) -> bool:
        """Return whether `rows` rows may be reserved for one more slot."""
        return self._total([*self._accounts.values(), Account(_NoRows(), in_blocks(rows))]) <= self.rows

    def admit(self, slot: HasLength, *, kept: bool = False) -> None:
        """Begin to account for `slot`, which has no rows yet, or for rows that are `kept`."""
        assert id(slot) not in self._accounts, "a slot is admitted once"
        self._accounts[id(slot)] = Account(slot, kept=kept)
        self._take(self._total(self._accounts.values()))

    def reserve(self, slot: HasLength, rows: int) -> bool:
        """Have `rows` rows in all reserved for `slot`, or more; return whether there were so many."""
        account = self._accounts[id(slot)]
        before, wanted = account.reserved, in_blocks(rows)
        if wanted <= before:
            return True
        account.reserved = wanted
        total = self._total(self._accounts.values()) if self._footprint else self._reserved + wanted - before
        if total > self.rows:
            account.reserved = before
            return False
        self._take(total)
        return True

    def close(self, slot: HasLength) -> None:
        """Free what is reserved for `slot`, which is used no more."""
        del self._accounts[id(slot)]
        self._take(self._total(self._accounts.values()))

    def check(self, slots: Iterable[HasLength]) -> None:
        """Raise `AssertionError` unless these `slots` are those accounted for, and every number holds."""
        found = {id(slot) for slot in slots}
        assert found == set(self._accounts), "every slot belongs to a request or to a kept prefix"
        accounts = self._accounts.values()
        assert self._reserved == self._total(accounts), "the sum of what is reserved"
        assert 0 <= self._reserved <= self.rows, "no more is reserved than there is"
        for account in accounts:
            assert account.slot.length <= account.reserved, "nothing is committed that was not reserved"

    def _take(self, total: int) -> None:
        self._reserved = total
        self.most_reserved = max(self.most_reserved, total)

    def _total(self, accounts: Iterable[Account]) -> int:
        """Return the rows that all of these take together."""
        slots: list[int] = []
        kept = 0
        for account in accounts:
            if account.kept:
                kept += account.reserved
            else:
                slots.append(account.reserved)
        taken = self._footprint(len(slots), max(slots, default=0)) if self._footprint else sum(slots)
        return taken + kept


class _NoRows:
    """A slot that there is not yet."""

    length = 0


def in_blocks(rows: int) -> int:
    """Return `rows` rounded up to whole blocks."""
    return -(-rows // BLOCK) * BLOCK
