"""The formats in which models write calls of tools, and which of them a model has."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.errors import InputError, shown
from runtime.tools.parsing import CallParser, ParsedAnswer
from runtime.tools.reader import SPACE, Reading

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class HermesParser(CallParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, again for each call."""

    opener = "<tool_call>"

    def candidate(self) -> Reading[None]:
        """See `CallParser`."""
        yield from self._reader.space()
        begun, whole = yield from self.call()
        if not begun:
            return
        if whole:
            yield from self.try_end("</tool_call>")
        self.end()


class LlamaParser(CallParser):
    """`{"name": ..., "parameters": {...}}` as the beginning of an answer, or after `<|python_tag|>` anywhere; further
    ones follow after `;`. Without the tag it is a call only where the name is that of a function that there is.
    """

    opener = "<|python_tag|>"
    _tagged = False

    def known(self, name: str) -> bool:
        """See `CallParser`."""
        return super().known(name) and (self._tagged or name in self._names)

    def outset(self) -> Reading[None]:
        """See `CallParser`."""
        yield from self._reader.space()
        if (yield from self._reader.peek()) == "{":
            yield from self._several()
            if not self._calls:
                self.give_up(self._resume)
        else:
            self._reader.place = 0

    def candidate(self) -> Reading[None]:
        """See `CallParser`."""
        self._tagged = True
        yield from self._reader.space()
        yield from self._several()

    def _several(self) -> Reading[None]:
        reader = self._reader
        while True:
            self._resume = reader.place + 1
            begun, whole = yield from self.call()
            self._tagged = False
            if not begun:
                # What began none after others is content.
                reader.place = 0
                return
            self.end()
            if not whole:
                return
            yield from reader.space()
            yield from reader.takes(";")
            yield from reader.space()
            following = yield from reader.peek()
            if not following and not reader.text.replace(";", "", 1).strip(SPACE):
                # Nothing but what separates calls.
                self._cut()
                return
            if following != "{":
                reader.place = 0
                return


class MistralParser(CallParser):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name{...}`, with `[CALL_ID]...` and
    `[ARGS]` before the arguments in some versions.
    """

    opener = "[TOOL_CALLS]"

    def candidate(self) -> Reading[None]:
        """See `CallParser`."""
        reader = self._reader
        yield from reader.space()
        following = yield from reader.peek()
        if following == "[":
            reader.place += 1
            yield from self._list()
        elif following == "{":
            begun, _ = yield from self.call()
            if begun:
                self.end()
        else:
            yield from self._named()

    def _list(self) -> Reading[None]:
        reader = self._reader
        while True:
            yield from reader.space()
            begun, whole = yield from self.call()
            if not begun:
                reader.place = 0
                return
            following = whole and (yield from self.try_literal(","))
            if whole and not following:
                yield from self.try_end("]")
            self.end()
            if not following:
                return

    def _named(self) -> Reading[None]:
        reader = self._reader
        name = yield from self._word()
        if not self.known(name):
            return
        if (yield from reader.takes("[CALL_ID]")):
            yield from self._word()
        yield from reader.takes("[ARGS]")
        yield from reader.space()
        if (yield from reader.peek()) == "{" and (yield from self.arguments(name)):
            self.end()

    def _word(self) -> Reading[str]:
        reader, begin = self._reader, self._reader.place
        while (following := (yield from reader.peek())) and (following.isalnum() or following in "_-"):
            reader.place += 1
        return reader.text[begin : reader.place]


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls: `before` and `after` all of them, each `{"name": ..., "arguments": ...}`, with the
    latter under `key`, and `between` them. `parser` finds them, `markers` are texts around them that may be special
    tokens. Ids of calls are `id_prefix` and `id_length` letters and digits.
    """

    name: str
    parser: type[CallParser]
    markers: tuple[str, ...]
    before: str
    between: str
    after: str
    key: str = "arguments"
    id_prefix: str = "call_"
    id_length: int = 24

    def parse(self, text: str, names: Collection[str] = ()) -> ParsedAnswer:
        """Return the texts and calls of a whole answer; `names` are the functions that there are."""
        parser, found = self.parser(names), ParsedAnswer()
        found.add(parser.push(text))
        found.add(parser.finish())
        return found

    def write(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Return calls, of a name and arguments each, as a model writes them."""
        written = [json.dumps({"name": name, self.key: arguments}, ensure_ascii=False) for name, arguments in calls]
        return f"{self.before}{self.between.join(written)}{self.after}"

    @property
    def example(self) -> str:
        """A call, with names for its parts."""
        return f'{self.before}{{"name": <name>, "{self.key}": <JSON object of the arguments>}}{self.after}'


HERMES = ToolFormat(
    "hermes",
    HermesParser,
    ("<tool_call>", "</tool_call>"),
    "<tool_call>\n",
    "\n</tool_call>\n<tool_call>\n",
    "\n</tool_call>",
)
LLAMA3 = ToolFormat("llama3", LlamaParser, ("<|python_tag|>",), "", "; ", "", "parameters")
MISTRAL = ToolFormat(
    "mistral",
    MistralParser,
    ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "[TOOL_CALLS][",
    ", ",
    "]",
    # Its templates refuse other ids.
    id_prefix="",
    id_length=9,
)
FORMATS = {one.name: one for one in (HERMES, LLAMA3, MISTRAL)}


def format_of(template: str, tokenizer: Tokenizer) -> ToolFormat:
    """Return the format of a model: that whose marker its chat `template` writes. Where the template takes tools in a
    way that shows none, that whose marker is a token; else Hermes's, which a model without any is told of.
    """
    order = (MISTRAL, HERMES, LLAMA3)
    for one in order:
        if one.markers[0] in template:
            return one
    if "tools" not in template:
        return HERMES
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return next((one for one in order if one.markers[0] in added), HERMES)


def named_format(name: str) -> ToolFormat:
    """Return the format of this name. Raises `InputError` where there is none."""
    if name not in FORMATS:
        raise InputError(f"a format of tool calls must be one of {', '.join(FORMATS)}, not {shown(name)}")
    return FORMATS[name]


def special_markers(form: ToolFormat, tokenizer: Tokenizer) -> dict[str, int]:
    """Return the markers that are special tokens, which text leaves out otherwise, with their ids."""
    added = tokenizer.get_added_tokens_decoder().items()
    return {token.content: number for number, token in added if token.special and token.content in form.markers}
