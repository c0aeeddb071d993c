"""Tools in prompts: functions as OpenAI's API describes them, for templates that take them and those that do not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runtime.chat.conversation import MOST_CHARACTERS, Message, read_plain
from runtime.errors import InputError, shown

Tool = Mapping[str, Any]
MOST_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# What a template is told of a function.
TOLD = ("name", "description", "parameters")


class CallFormat(Protocol):
    """How calls are written, for templates that have no way of their own."""

    @property
    def example(self) -> str:
        """A call, with names for its parts."""
        ...

    def write(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Return these calls, of a name and arguments each, as a model writes them."""
        ...


def read_tools(
    tools: Sequence[Tool],
    most_characters: int = MOST_CHARACTERS,
    change: Callable[[str], str] = lambda text: text,
) -> list[dict[str, Any]]:
    """Return `tools` as `transformers` gives them to a template, each text in them as `change` makes it.

    Raises `InputError` for what describes no function, for names that are no names or come twice, and for more than
    128.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise InputError(f"tools must be a list of functions, not {shown(tools)}")
    if len(tools) > MOST_TOOLS:
        raise InputError(f"there are {len(tools)} tools, and {MOST_TOOLS} are allowed; give fewer")
    found: list[dict[str, Any]] = []
    names: set[str] = set()
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping):
            raise InputError(
                f"tool {index} must be {{'type': 'function', 'function': {{'name': ...}}}}, not {shown(tool)}"
            )
        name = function.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError(
                f"the name of tool {index} must be 1 to 64 letters, digits, - and _, not {shown(name)}; change it"
            )
        if name in names:
            raise InputError(f"two tools have the name {name!r}; give each its own")
        names.add(name)
        if not isinstance(function.get("description", ""), str | None):
            raise InputError(f"the description of tool {name!r} must be a string")
        if not isinstance(function.get("parameters", {}), Mapping | None):
            raise InputError(f"the parameters of tool {name!r} must be a JSON schema, a dictionary")
        about = {key: function[key] for key in TOLD if function.get(key) is not None}
        found.append({"type": "function", "function": about})
    plain: list[dict[str, Any]] = read_plain(found, "the tools have", most_characters, change)
    return plain


@dataclass(frozen=True)
class ToolUse:
    """What a template does with tools: whether it `takes` them, how it wants calls of earlier answers (`as_text` for
    arguments that are a JSON text, and `content` where there was none), and whether it takes a system message.
    """

    takes: bool
    as_text: bool = False
    content: tuple[str | None, ...] = ()
    system: bool = True


PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_function",
        "description": "A function.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}, "required": ["probe_key"]},
    },
}
PROBE_ARGUMENTS = {"probe_key": "probe_value"}
ASKED = {"role": "user", "content": "Hello"}
# A template quotes what it did not expect: a text as a JSON string, an object as Python does.
MISREAD = ('\\"probe_key', "'probe_key'")
# Ways to say that there is no content: without it, as transformers documents, an empty text, or null.
CONTENTS: tuple[tuple[str | None, ...], ...] = ((), ("",), (None,))


def tool_use(render: Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]) -> ToolUse:
    """Return what a template does with tools, seen by what it renders: `render` returns the prompt of messages and
    tools, an empty one where it fails.
    """
    if "probe_function" not in render([ASKED], [PROBE_TOOL]):
        system = {"role": "system", "content": "probe_system"}
        return ToolUse(False, system="probe_system" in render([system, ASKED], None))
    for as_text in (False, True):
        for content in CONTENTS:
            use = ToolUse(True, as_text, content)
            function = {"name": "probe_function", "arguments": PROBE_ARGUMENTS}
            # Some templates take ids of nine letters and digits alone.
            call = {"id": "probe0000", "type": "function", "function": function}
            called = {"role": "assistant", "tool_calls": [call]}
            answered = {"role": "tool", "tool_call_id": call["id"], "name": function["name"], "content": "probe_result"}
            text = render(as_taken([ASKED, called, answered], use), [PROBE_TOOL])
            if all(part in text for part in ("probe_key", "probe_value", "probe_result")) and not any(
                part in text for part in MISREAD
            ):
                return use
    return ToolUse(True)


def as_taken(messages: Sequence[dict[str, Any]], use: ToolUse) -> list[dict[str, Any]]:
    """Return `messages` with calls of tools as a template takes them."""
    found = []
    for message in messages:
        if "tool_calls" in message:
            calls = [_call_as_taken(call, use.as_text) for call in message["tool_calls"]]
            message = {**message, "tool_calls": calls}
            if "content" not in message and use.content:
                message["content"] = use.content[0]
        found.append(message)
    return found


def _call_as_taken(call: Any, as_text: bool) -> Any:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call
    function = call["function"]
    if not as_text or not isinstance(function.get("arguments"), dict):
        return call
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def without_tools(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], form: CallFormat, *, system: bool
) -> list[dict[str, Any]]:
    """Return `messages` for a template that knows no tools: those are described in a system message, or in the user's
    first one where there can be none; calls are in the text of answers, and results in messages of the user.
    """
    found: list[dict[str, Any]] = []
    results = False
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message.get('content', '')}\n</tool_response>"
            if results:
                found[-1] = {"role": "user", "content": f"{found[-1]['content']}\n{text}"}
            else:
                found.append({"role": "user", "content": text})
            results = True
            continue
        results = False
        if "tool_calls" in message:
            calls = form.write([_written(call) for call in message["tool_calls"]])
            said = message.get("content")
            rest = {key: value for key, value in message.items() if key not in ("tool_calls", "content")}
            message = {**rest, "content": f"{said}\n{calls}" if said else calls}
        found.append(message)
    return _with_description(found, description(tools, form), system) if tools else found


def description(tools: Sequence[dict[str, Any]], form: CallFormat) -> str:
    """Return what a model is told of `tools` whose template does not tell it."""
    described = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You can call functions. Each is described by a line of JSON:\n"
        f"<tools>\n{described}\n</tools>\n\n"
        f"To call functions, answer with the name and the arguments of each in this form, and nothing else:\n"
        f"{form.example}\n\n"
        "You are then told what they return. Where no function is needed, answer as usual."
    )


def _with_description(messages: list[dict[str, Any]], text: str, system: bool) -> list[dict[str, Any]]:
    role = "system" if system else "user"
    if messages and messages[0]["role"] == role:
        first = messages[0]
        parts = (first["content"], text) if system else (text, first["content"])
        return [{**first, "content": "\n\n".join(parts)}, *messages[1:]]
    return [{"role": role, "content": text}, *messages]


def _written(call: Any) -> tuple[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"a call of a tool must have a function with a name, not {shown(call)}")
    return function["name"], function.get("arguments", {})


def uses_tools(messages: Sequence[Message]) -> bool:
    """Return whether there are calls of tools among `messages`, or what came of them."""
    return any(message.get("role") == "tool" or "tool_calls" in message for message in messages)
