"""A bounded pool of finished texts, the oldest out, and where in it two tokens came one after the other.

The pool is one ring of tokens. Places count on for ever, and a place's token is at its remainder; so whoever holds a
place may ask for it at any time, and a place that was written over has nothing. The places of a pair of tokens are a
chain, from the latest to earlier ones, kept in a second ring: a text is never copied for a request.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from runtime.checks import whole

# Tokens; about 200 bytes each at most, most of it for pairs that came once.
MOST_TOKENS = 1 << 26
# Stands before each text, and for a place that has nothing.
NOTHING = -1
_BITS = 32


class TextPool:
    """Up to `capacity` tokens of texts. It is for one thread, the engine's."""

    def __init__(self, capacity: int) -> None:
        self.capacity = whole("text_pool_tokens", capacity, 1, MOST_TOKENS)
        self._tokens = array("i", bytes(4 * capacity))
        # For the second token of a pair, where the same pair ended before.
        self._earlier = array("q", bytes(8 * capacity))
        self._latest: dict[int, int] = {}
        # The place after the last token; those from `_start` on are there.
        self._end = self._start = 0

    def __len__(self) -> int:
        return self._end - self._start

    def add(self, text: Sequence[int]) -> None:
        """Put `text` in, and the oldest tokens out for it; of a text longer than the pool its end."""
        for token in (NOTHING, *text[-(self.capacity - 1) :]) if self.capacity > 1 and text else ():
            self._put(token)

    def at(self, place: int) -> int:
        """Return the token at `place`, NOTHING between texts and where there is none any more, or none yet."""
        return self._tokens[place % self.capacity] if self._start <= place < self._end else NOTHING

    def places(self, before_last: int, last: int) -> Iterator[int]:
        """Yield the places after two tokens, the latest first, where a text goes on."""
        place = self._latest.get(before_last << _BITS | last, -1)
        # A chain may lead to what was written over.
        while place > self._start:
            if self.at(place + 1) != NOTHING:
                yield place + 1
            place = self._earlier[place % self.capacity]

    def common(self, place: int, last: Sequence[int], most: int) -> int:
        """Return how many of the `last` tokens are those before `place`, up to `most`."""
        matched = 0
        for token in reversed(last):
            if matched == most or self.at(place - 1 - matched) != token:
                break
            matched += 1
        return matched

    def _put(self, token: int) -> None:
        place = self._end
        if len(self) == self.capacity:
            self._forget()
        self._tokens[place % self.capacity] = token
        self._end += 1
        before = self.at(place - 1)
        if before != NOTHING and token != NOTHING:
            pair = before << _BITS | token
            self._earlier[place % self.capacity] = self._latest.get(pair, -1)
            self._latest[pair] = place

    def _forget(self) -> None:
        """Take the oldest token out, and with it the pair that it begins."""
        first, second = self.at(self._start), self.at(self._start + 1)
        self._start += 1
        if first != NOTHING and second != NOTHING:
            pair = first << _BITS | second
            if self._latest[pair] == self._start:
                del self._latest[pair]
