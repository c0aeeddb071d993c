"""Conversations as users give them: checked, and made of what JSON has, as only that goes to another process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.errors import InputError, PromptTooLongError, shown

Message = Mapping[str, Any]

# Characters of a conversation, and of the prompt that a template makes of it.
MOST_CHARACTERS = 1 << 24
# What a value costs besides its text: a conversation of a million empty lists is large too.
VALUE_CHARACTERS = 8
DEEPEST = 128
# Names under which reasoning is passed; templates read the first one, some the second.
REASONING = ("reasoning_content", "thinking", "reasoning")


def read_conversation(
    messages: Sequence[Message],
    most_characters: int = MOST_CHARACTERS,
    change: Callable[[str], str] = lambda text: text,
) -> list[dict[str, Any]]:
    """Return `messages` as `transformers` gives them to a template, each text in them as `change` makes it. Arguments
    of calls that are the text of a JSON object become that object; other texts stay as they are.

    Raises `InputError` when a message lacks `role` or `content` (an answer that calls tools needs none) or has what
    JSON has not, and `PromptTooLongError` when all have more than `most_characters`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InputError(f"a conversation must be a list of messages, not {shown(messages)}")
    if not messages:
        raise InputError("the conversation is empty; give at least one message with 'role' and 'content'")
    reader = _Reader(most_characters, change)
    found = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {index} must be a dictionary with 'role' and 'content', not {shown(message)}")
        calls = message.get("tool_calls")
        needed = ("role",) if calls and message.get("content") is None else ("role", "content")
        missing = [key for key in needed if not isinstance(message.get(key), str)]
        if missing:
            raise InputError(f"message {index} needs {missing[0]!r} as a string")
        if isinstance(calls, list | tuple):
            message = {**message, "tool_calls": [_with_object(call, most_characters) for call in calls] or None}
        plain = reader.read_whole(message, f"message {index}")
        found.append(_with_reasoning({key: value for key, value in plain.items() if value is not None}))
    return found


def read_plain(
    value: Any,
    where: str = "messages have",
    most_characters: int = MOST_CHARACTERS,
    change: Callable[[str], str] = lambda text: text,
) -> Any:
    """Return `value`, which is found `where` an error says, in plain types and with each text as `change` makes it.
    Raises what `read_conversation` does.
    """
    return _Reader(most_characters, change, where).read_whole(value, where.removesuffix(" have"))


def _with_object(call: Any, most_characters: int) -> Any:
    """Return a call with its arguments as an object, where they are the text of one."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str) or len(arguments) > most_characters:
        return call
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": found}} if isinstance(found, dict) else call


def check_characters(text: str, what: str = "prompt") -> None:
    """Raise `InputError` when `text`, a `what`, has half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the {what} has {text[error.start]!r}, which is no character: bytes that are not UTF-8 become so; "
            "convert it to UTF-8"
        ) from error


class _Reader:
    def __init__(self, most_characters: int, change: Callable[[str], str], whole: str = "the conversation has") -> None:
        self._most = self._left = most_characters
        self._change = change
        self._all = whole

    def read_whole(self, value: Any, where: str) -> Any:
        """Return `value`, found at the place that `where` names, in plain types."""
        try:
            return self.read(value, where, 0)
        except RecursionError as error:
            raise _too_deep(where) from error

    def read(self, value: Any, where: str, depth: int) -> Any:
        """Return `value`, found at so many levels below the place that `where` names, in plain types."""
        if depth > DEEPEST:
            raise _too_deep(where)
        self._left -= VALUE_CHARACTERS
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, Mapping):
            items = {}
            for key, item in value.items():
                if not isinstance(key, str):
                    raise InputError(f"{where} has the key {shown(key)}; keys must be strings")
                items[self._text(key)] = self.read(item, where, depth + 1)
            return items
        if isinstance(value, list | tuple):
            listed = []
            for item in value:
                listed.append(self.read(item, where, depth + 1))
            return listed
        self._check()
        # Subclasses, such as enumerations, as the numbers that they are.
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return self._whole(value, where)
        if isinstance(value, float):
            return float(value)
        raise InputError(
            f"{where} has a value of type {type(value).__name__}; messages are made of texts, numbers, lists, "
            "dictionaries and None"
        )

    def _whole(self, value: int, where: str) -> int:
        if value.bit_length() > 1024:
            raise InputError(f"{where} has a whole number of {value.bit_length()} bits; give it as a text")
        return int(value)

    def _text(self, value: str) -> str:
        self._left -= len(value)
        self._check()
        check_characters(value)
        return self._change(str.__str__(value))

    def _check(self) -> None:
        if self._left < 0:
            raise PromptTooLongError(
                f"{self._all} more than the {self._most:,} characters that a prompt may have here; shorten it"
            )


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _too_deep(where: str) -> InputError:
    return InputError(f"{where} is nested more than {DEEPEST} levels deep; give it flatter")
