"""Calls of tools in an answer, found as its text comes: what is no call is content, and nothing is lost."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from runtime.tools.reader import SPACE, Reader, Reading, half_at_the_end, unescaped

# What OpenAI's API allows as the name of a function.
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True)
class Content:
    """Text that is part of no call."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """Call `index`, from 0, is one of the function `name`; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True)
class ArgumentsPart:
    """The next part of a call's arguments, which are JSON as the model writes it; it ends within no escape."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """Call `index` is over; `source` is all that the answer has of it."""

    index: int
    source: str


Event = Content | CallBegun | ArgumentsPart | CallEnded


@dataclass
class Call:
    """A call of the function `name`. `arguments` are JSON as the model wrote it, valid where a grammar forced it to be;
    `source` is all that the answer has of the call.
    """

    name: str
    arguments: str = ""
    source: str = ""


@dataclass
class ParsedAnswer:
    """An answer's texts and calls in their order."""

    parts: list[str | Call] = field(default_factory=list)

    @property
    def content(self) -> str:
        """The text beside the calls."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[Call]:
        """The calls."""
        return [part for part in self.parts if isinstance(part, Call)]

    def add(self, events: Sequence[Event]) -> None:
        """Take note of what a parser has told."""
        for event in events:
            last = self.parts[-1] if self.parts else None
            if isinstance(event, CallBegun):
                self.parts.append(Call(event.name))
            elif isinstance(event, Content):
                if isinstance(last, str):
                    self.parts[-1] = last + event.text
                else:
                    self.parts.append(event.text)
            elif isinstance(last, Call):
                if isinstance(event, CallEnded):
                    last.source = event.source
                else:
                    last.arguments += event.text


class CallParser(ABC):
    """Finds calls in one answer: give it the text as it comes, with `push`, and say when it has ended, with `finish`.

    It is what a format extends: `opener` begins a call anywhere, and `candidate` reads what follows it. `names` are the
    functions that there are. White space before a call, and after the last one, belongs to the call.
    """

    opener = ""
    # Where a call's arguments are.
    keys: tuple[str, ...] = ("arguments", "parameters")

    def __init__(self, names: Collection[str] = ()) -> None:
        self._names = frozenset(names)
        self._reader = Reader()
        # Where the text begins that nothing has been told of.
        self._start = 0
        self._calls = 0
        # After a call there may be white space that belongs to it.
        self._follows = False
        self._told: list[Event] = []
        self._running = self._run()

    def push(self, text: str) -> list[Event]:
        """Take more text and return what is certain by it."""
        self._reader.text += text
        return self._advance()

    def finish(self) -> list[Event]:
        """Return the rest: no more text comes."""
        self._reader.ended = True
        return self._advance()

    def _advance(self) -> list[Event]:
        next(self._running, None)
        told, self._told = self._told, []
        return told

    # For formats.

    @abstractmethod
    def candidate(self) -> Reading[None]:
        """Read what follows an opener: `call` is for objects, `begin` and `arguments` are for other ways, and `end` for
        the end of each. Where no call has begun by then, the opener is content.
        """

    def outset(self) -> Reading[None]:
        """Read what may be at an answer's beginning without an opener."""
        yield from ()

    def known(self, name: str) -> bool:
        """Return whether a call may have this name."""
        return NAME.fullmatch(name) is not None

    def begin(self, name: str) -> None:
        """Tell that a call begins."""
        self._told.append(CallBegun(self._calls, name))
        self._calls += 1

    def end(self) -> None:
        """Tell that the call which has begun ends here."""
        reader = self._reader
        self._told.append(CallEnded(self._calls - 1, reader.text[self._start : reader.place]))
        self._cut()
        self._follows = True

    def try_literal(self, literal: str) -> Reading[bool]:
        """Read white space and `literal`, both or neither; return whether they were there."""
        reader, before = self._reader, self._reader.place
        yield from reader.space()
        if (yield from reader.takes(literal)):
            return True
        reader.place = before
        return False

    def try_end(self, literal: str) -> Reading[bool]:
        """The same for what ends a call: an answer that is cut off may have a part of it."""
        if (yield from self.try_literal(literal)):
            return True
        reader = self._reader
        rest = reader.text[reader.place :].lstrip(SPACE)
        if reader.ended and literal.startswith(rest):
            reader.place = len(reader.text)
            return True
        return False

    def call(self) -> Reading[tuple[bool, bool]]:
        """Read an object with a name and arguments; return whether a call has begun by it, and whether it is whole.

        Where it is not, what follows the last part that is well formed is left.
        """
        reader = self._reader
        name: str | None = None
        early: str | None = None
        begun = False
        if not (yield from reader.takes("{")):
            return False, False
        while True:
            left = reader.place
            yield from reader.space()
            key = yield from self._string()
            if key is None or not (yield from self.try_literal(":")):
                break
            yield from reader.space()
            if key == "name" and name is None:
                name = yield from self._string()
                if name is None or not self.known(name):
                    return False, False
                if early is not None:
                    self._whole(name, early)
                    begun = True
            elif key in self.keys and not begun and early is None:
                if name is None:
                    early = yield from self._early()
                    if early is None:
                        return False, False
                else:
                    begun = yield from self.arguments(name)
                    if not begun:
                        return False, False
            elif not (yield from reader.value()):
                break
            left = reader.place
            if (yield from self.try_literal(",")):
                continue
            if not (yield from self.try_literal("}")):
                break
            if not begun and name is not None:
                self._whole(name, "{}")
                begun = True
            return begun, True
        if not (begun and reader.ended and reader.place == len(reader.text)):
            reader.place = left
        return begun, False

    def arguments(self, name: str) -> Reading[bool]:
        """Read the arguments of a call of `name` and tell them as they come; return whether they are any: an object, a
        string that is one, or null.
        """
        following = yield from self._reader.peek()
        if following == "{":
            self.begin(name)
            yield from self._object()
            return True
        if following == '"':
            return (yield from self._quoted(name))
        if (yield from self._reader.takes("null")):
            self._whole(name, "{}")
            return True
        return False

    # The text around them.

    def _run(self) -> Reading[None]:
        yield from self.outset()
        while (yield from self._content()):
            resume = self._reader.place
            before = self._calls
            yield from self.candidate()
            if self._calls == before:
                self.give_up(resume)

    def give_up(self, resume: int) -> None:
        """Tell the text up to `resume` as content, and go on there: it begins no call."""
        self._reader.place = resume
        self._tell_content(resume)

    def _content(self) -> Reading[bool]:
        """Tell content up to the next opener, and read that; return False at the end."""
        reader = self._reader
        while True:
            place = reader.text.find(self.opener, reader.place)
            if place >= 0:
                self._tell_content(self._before_space(place))
                reader.place = place - self._dropped + len(self.opener)
                return True
            kept = self._beginning()
            self._tell_content(self._before_space(len(reader.text) - kept))
            reader.place = max(len(reader.text) - kept, 0)
            if not (yield from reader.more()):
                if not (self._follows and not reader.text.strip(SPACE)):
                    self._tell_content(len(reader.text))
                return False

    def _beginning(self) -> int:
        """Return how many characters at the end may be the beginning of an opener."""
        text = self._reader.text
        most = min(len(self.opener) - 1, len(text))
        return next((count for count in range(most, 0, -1) if text.endswith(self.opener[:count])), 0)

    def _before_space(self, end: int) -> int:
        return len(self._reader.text[:end].rstrip(SPACE))

    def _tell_content(self, end: int) -> None:
        text = self._reader.text[self._start : end]
        self._dropped = 0
        if text:
            self._told.append(Content(text))
            self._follows = False
            self._dropped = end
            self._reader.drop(end)
            self._start = 0

    def _cut(self) -> None:
        self._reader.drop(self._reader.place)
        self._start = 0

    # Arguments and names.

    def _string(self) -> Reading[str | None]:
        begin = self._reader.place
        if not (yield from self._reader.string()):
            return None
        return unescaped(self._reader.text[begin + 1 : self._reader.place - 1])

    def _whole(self, name: str, arguments: str) -> None:
        self.begin(name)
        self._told.append(ArgumentsPart(self._calls - 1, arguments))

    def _early(self) -> Reading[str | None]:
        """Read arguments that come before their name."""
        begin = self._reader.place
        following = yield from self._reader.peek()
        if not (yield from self._reader.value()):
            return None
        found = self._reader.text[begin : self._reader.place]
        if following == "{":
            return found
        if following == '"':
            found = unescaped(found[1:-1])
            return found if found.lstrip(SPACE).startswith("{") else None
        return "{}" if found == "null" else None

    def _object(self) -> Reading[None]:
        reader, index = self._reader, self._calls - 1
        sent = reader.place

        def progress() -> None:
            nonlocal sent
            if reader.place > sent:
                self._told.append(ArgumentsPart(index, reader.text[sent : reader.place]))
                sent = reader.place

        if not (yield from reader.value(progress)):
            # Its end has not come: the rest is what there is.
            reader.place = len(reader.text)
        progress()

    def _quoted(self, name: str) -> Reading[bool]:
        """Read arguments that are an object within a string."""
        reader = self._reader
        begin = reader.place
        reader.place += 1
        yield from reader.space()
        if (yield from reader.peek()) != "{":
            return False
        self.begin(name)
        index, sent = self._calls - 1, begin + 1
        reader.place = begin

        def progress() -> None:
            nonlocal sent
            end = reader.place
            if end <= sent:
                return
            if not reader.text.startswith('"', end):
                end -= half_at_the_end(reader.text, sent, end)
            if end > sent:
                self._told.append(ArgumentsPart(index, unescaped(reader.text[sent:end])))
                sent = end

        if not (yield from reader.string(progress)):
            reader.place = len(reader.text)
            self._told.append(ArgumentsPart(index, unescaped(reader.text[sent:])))
        return True
