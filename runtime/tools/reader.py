"""Text that comes in pieces, read by coroutines: JSON by its structure, as models write it, well formed or not."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
# Yields where it needs more text, and returns what it has read.
Reading = Generator[None, None, T]

SPACE = " \t\r\n"
HEX = "[0-9a-fA-F]"
# What is within a string: an escape is taken whole, or not yet.
STRING = re.compile(rf'[^"\\]*(?:\\(?:u{HEX}{{4}}|u(?={HEX}{{0,3}}[^0-9a-fA-F])|[^u])[^"\\]*)*', re.DOTALL)
STRUCTURE = re.compile(r'["{}\[\]]')
SCALAR = re.compile(r"[-+.0-9a-zA-Z]*")
ESCAPE = re.compile(rf'\\(u{HEX}{{4}}(?:\\u[dD][c-fC-F]{HEX}{{2}})?|["\\/bfnrt])')
# The first half of a character, whose second may follow.
HALF = re.compile(rf"\\u[dD][89abAB]{HEX}{{2}}")
PLAIN = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def unescaped(text: str) -> str:
    """Return what the inside of a JSON string stands for; what is no escape stays, half a character becomes U+FFFD."""

    def one(found: re.Match[str]) -> str:
        escape = found[1]
        if escape[0] != "u":
            return PLAIN[escape]
        units = b"".join(int(unit, 16).to_bytes(2, "big") for unit in escape[1:].split("\\u"))
        return units.decode("utf-16-be", errors="replace")

    return ESCAPE.sub(one, text)


def half_at_the_end(text: str, begin: int, end: int) -> int:
    """Return how long an escape is that ends at `end` and is the first half of a character, 0 where none is."""
    found = deque(ESCAPE.finditer(text, begin, end), maxlen=1)
    return len(found[0][0]) if found and found[0].end() == end and HALF.fullmatch(found[0][0]) else 0


class Reader:
    """The `text` that has come, read up to `place`."""

    def __init__(self) -> None:
        self.text = ""
        self.place = 0
        self.ended = False

    def drop(self, end: int) -> None:
        """Forget the text before `end`."""
        self.text = self.text[end:]
        self.place -= end

    def more(self) -> Reading[bool]:
        """Wait for more text; return False where there is none."""
        before = len(self.text)
        while not self.ended and len(self.text) == before:
            yield
        return len(self.text) > before

    def peek(self) -> Reading[str]:
        """Return the next character, none at the end."""
        while self.place >= len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.place]

    def space(self) -> Reading[None]:
        """Read spaces and line breaks."""
        while (following := (yield from self.peek())) and following in SPACE:
            self.place += 1

    def takes(self, literal: str) -> Reading[bool]:
        """Read `literal` where the text goes on with it; return whether it does."""
        while True:
            found = self.text[self.place : self.place + len(literal)]
            if found == literal:
                self.place += len(literal)
                return True
            if not literal.startswith(found) or not (yield from self.more()):
                return False

    def string(self, progress: Callable[[], None] = lambda: None) -> Reading[bool]:
        """Read a JSON string; return False where there is none that ends. `progress` is called where the text before
        `place` ends within no escape.
        """
        if not (yield from self.takes('"')):
            return False
        while True:
            inside = STRING.match(self.text, self.place)
            assert inside is not None
            self.place = inside.end()
            progress()
            if self.text.startswith('"', self.place):
                self.place += 1
                return True
            if not (yield from self.more()):
                return False

    def value(self, progress: Callable[[], None] = lambda: None) -> Reading[bool]:
        """Read a JSON value by its structure: brackets and strings that end. Return False where there is none."""
        following = yield from self.peek()
        if following == '"':
            return (yield from self.string(progress))
        if following in ("{", "["):
            return (yield from self._nested(progress))
        begin = self.place
        while True:
            scalar = SCALAR.match(self.text, self.place)
            assert scalar is not None
            self.place = scalar.end()
            if self.place < len(self.text) or not (yield from self.more()):
                return self.place > begin

    def _nested(self, progress: Callable[[], None]) -> Reading[bool]:
        depth = 0
        while True:
            found = STRUCTURE.search(self.text, self.place)
            if found is None:
                self.place = len(self.text)
                progress()
                if not (yield from self.more()):
                    return False
                continue
            self.place = found.start()
            if found[0] == '"':
                if not (yield from self.string(progress)):
                    return False
                continue
            self.place += 1
            depth += 1 if found[0] in "{[" else -1
            if depth == 0:
                return True
