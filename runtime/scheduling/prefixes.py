"""Kept rows of prompts and answers that have ended, for prompts that begin like them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from runtime.engines.protocol import Kept

# Rows that are worth copying: fewer are computed as soon.
SHORTEST = 16
# Of those that share the longest beginning of whole blocks, so many are looked at, the latest first.
LOOKED_AT = 8


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


@dataclass(frozen=True)
class Prefix:
    """The kept `rows` of `tokens`, one for each."""

    tokens: tuple[int, ...]
    rows: Kept


class Prefixes:
    """Kept rows, those used last at the end.

    They are found by the beginnings of their tokens, of `SHORTEST`, twice, three times as many tokens and so on: a
    look-up takes the time of the prompt's length, however many are kept.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Prefix] = OrderedDict()
        self._by_beginning: dict[int, dict[int, None]] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._kept.values())

    def add(self, kept: Prefix) -> None:
        """Keep these rows."""
        self._number += 1
        self._kept[self._number] = kept
        for beginning in _beginnings(kept.tokens):
            self._by_beginning.setdefault(beginning, {})[self._number] = None

    def longest(self, tokens: Sequence[int]) -> tuple[Prefix | None, int]:
        """Return the kept rows that share the longest beginning with `tokens`, and its length; (None, 0) where none
        share `SHORTEST` tokens.
        """
        numbers: dict[int, None] = {}
        for beginning in _beginnings(tokens):
            found = self._by_beginning.get(beginning)
            if not found:
                break
            numbers = found
        best: Prefix | None = None
        length = SHORTEST - 1
        for number in islice(reversed(numbers), LOOKED_AT):
            # Beginnings are told apart by a hash: what they say is looked at.
            shared = common(self._kept[number].tokens, tokens)
            if shared > length:
                best, length = self._kept[number], shared
            if length == len(tokens):
                break
        return best, length if best else 0

    def use(self, kept: Prefix) -> None:
        """Take note that `kept` was of use: it is dropped after all others."""
        self._kept.move_to_end(self._number_of(kept))

    def covered_by(self, tokens: Sequence[int]) -> list[Prefix]:
        """Remove and return those whose tokens `tokens` begin with: they are of no more use than the longer one."""
        found: dict[int, None] = {}
        for length, beginning in enumerate(_beginnings(tokens), start=1):
            for number in self._by_beginning.get(beginning, ()):
                kept = self._kept[number].tokens
                # Its last whole block is this one.
                if len(kept) // SHORTEST == length and len(kept) <= len(tokens) and common(kept, tokens) == len(kept):
                    found[number] = None
        return [self._remove(number) for number in found]

    def oldest(self) -> Prefix | None:
        """Remove and return what has not been used for the longest time."""
        return self._remove(next(iter(self._kept))) if self._kept else None

    def _number_of(self, kept: Prefix) -> int:
        return next(number for number, one in reversed(self._kept.items()) if one is kept)

    def _remove(self, number: int) -> Prefix:
        kept = self._kept.pop(number)
        for beginning in _beginnings(kept.tokens):
            numbers = self._by_beginning[beginning]
            del numbers[number]
            if not numbers:
                del self._by_beginning[beginning]
        return kept


def _beginnings(tokens: Sequence[int]) -> Iterator[int]:
    """Yield a hash of each beginning of a whole number of blocks, the shortest first."""
    value = 0
    for start in range(0, len(tokens) - SHORTEST + 1, SHORTEST):
        value = hash((value, *tokens[start : start + SHORTEST]))
        yield value
