"""Accounts for the memory of an engine's cache: the rows that each slot has committed, and those reserved for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

# Rows are reserved in blocks of so many.
BLOCK = 16


class HasLength(Protocol):
    """Anything that keeps rows, `length` of them."""

    @property
    def length(self) -> int:
        """The number of committed rows."""
        ...


@dataclass
class Account:
    """What a slot takes: `reserved` rows, of which the slot itself says how many are committed."""

    slot: HasLength
    reserved: int = 0


class CachePool:
    """The `rows` that all slots of an engine may take together.

    Nothing is written into a slot beyond what is reserved for it, and what is reserved never exceeds `rows`.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._accounts: dict[int, Account] = {}
        self._reserved = 0
        self.most_reserved = 0

    @property
    def reserved(self) -> int:
        """The rows that are reserved for all slots together."""
        return self._reserved

    @property
    def free(self) -> int:
        """The rows that may still be reserved."""
        return self.rows - self._reserved

    def __len__(self) -> int:
        return len(self._accounts)

    def admit(self, slot: HasLength) -> None:
        """Begin to account for `slot`, which has no rows yet."""
        assert id(slot) not in self._accounts, "a slot is admitted once"
        self._accounts[id(slot)] = Account(slot)

    def reserve(self, slot: HasLength, rows: int) -> bool:
        """Have `rows` rows in all reserved for `slot`, or more; return whether there were so many."""
        account = self._accounts[id(slot)]
        more = in_blocks(rows) - account.reserved
        if more > self.free:
            return False
        if more > 0:
            account.reserved += more
            self._reserved += more
            self.most_reserved = max(self.most_reserved, self._reserved)
        return True

    def close(self, slot: HasLength) -> None:
        """Free what is reserved for `slot`, which is used no more."""
        self._reserved -= self._accounts.pop(id(slot)).reserved

    def check(self, slots: Iterable[HasLength]) -> None:
        """Raise `AssertionError` unless these `slots` are those accounted for, and every number holds."""
        found = {id(slot) for slot in slots}
        assert found == set(self._accounts), "every slot belongs to a request or to a kept prefix"
        accounts = self._accounts.values()
        assert self._reserved == sum(account.reserved for account in accounts), "the sum of what is reserved"
        assert 0 <= self._reserved <= self.rows, "no more is reserved than there is"
        for account in accounts:
            assert account.slot.length <= account.reserved, "nothing is committed that was not reserved"


def in_blocks(rows: int) -> int:
    """Return `rows` rounded up to whole blocks."""
    return -(-rows // BLOCK) * BLOCK
