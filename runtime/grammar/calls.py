"""Grammars of calls of tools, in llguidance's variant of Lark: the markup of a format, names of functions, and
arguments that fit their schemas.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import InputError, shown
from runtime.grammar.given import MOST_TEXT
from runtime.grammar.schema import prepared
from runtime.tools.formats import ToolFormat

# What a function without parameters is called with.
NONE: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ANY: dict[str, Any] = {"type": "object"}
# Between values, as models have seen them: as Python writes JSON.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
TEXT = r"/(.|\n)*/"
# Text that is not taken for a call where a call needs no marker.
NO_OBJECT = r"/([ \t\r\n]*([^{ \t\r\n](.|\n)*)?)/"


@dataclass(frozen=True)
class Function:
    """A function that may be called: with `parameters` its arguments fit this schema, with None they are any object."""

    name: str
    parameters: Mapping[str, Any] | None


def function_of(tool: Mapping[str, Any], *, fits: bool) -> Function:
    """Return the function that a tool is, whose arguments need not be those of its schema unless that `fits`. Raises
    `InputError` for parameters that are no object's.
    """
    about = tool["function"]
    parameters = about.get("parameters")
    if not fits:
        return Function(about["name"], None)
    if parameters is None:
        return Function(about["name"], NONE)
    if parameters.get("type", "object") != "object":
        raise InputError(
            f"the parameters of tool {about['name']!r} must be a schema of type object, not "
            f"{shown(parameters['type'])}; put them into an object"
        )
    return Function(about["name"], {**parameters, "type": "object"})


def grammar_of_calls(
    form: ToolFormat, functions: Sequence[Function], markers: Mapping[str, int], *, required: bool, parallel: bool
) -> str:
    """Return the grammar of answers that call `functions`: of nothing else where calls are `required`, else of free
    text in which calls are such. With `parallel` there may be several. `markers` are special tokens, with their ids.

    Raises `InputError` for a schema that cannot be held to.
    """
    rules = _Rules(form, functions, markers, parallel)
    if form.name == "hermes":
        start = rules.tagged("<tool_call>", required)
    elif form.name == "mistral":
        start = rules.tagged("[TOOL_CALLS]", required)
    else:
        start = rules.untagged("<|python_tag|>", required)
    return "\n".join([f"start: {start}", *rules.lines]) + "\n"


class _Rules:
    def __init__(
        self, form: ToolFormat, functions: Sequence[Function], markers: Mapping[str, int], parallel: bool
    ) -> None:
        self._form = form
        self._functions = functions
        self._markers = markers
        self._parallel = parallel
        self.lines: list[str] = []
        length = 0
        for index, function in enumerate(functions):
            self.lines.append(f"args_{index}: %json {_schema(function)}")
            length += len(self.lines[-1])
            # Before the others are read: whoever asks may wait for it.
            if length > MOST_TEXT:
                raise InputError(
                    f"the parameters of the first {index + 1} tools have {length} characters, and a grammar may have "
                    f"{MOST_TEXT}; give fewer tools, or smaller schemas"
                )

    def tagged(self, opener: str, required: bool) -> str:
        """Add the rules of calls that begin with a marker, and return what an answer is."""
        between = "\\n"
        if opener == "<tool_call>":
            close = self._text("</tool_call>")
            self.lines.append(f'rest: "\\n" {self._objects()} "\\n" {close}')
        elif "[ARGS]" in self._markers:
            args = self._text("[ARGS]")
            one = [f"{_quoted(function.name)} {args} args_{index}" for index, function in enumerate(self._functions)]
            self.lines.append(f"rest: {' | '.join(one)}")
            between = ""
        else:
            body = self._objects()
            more = ' (", " call_object)*' if self._parallel else ""
            self.lines.append(f'rest: "[" {body}{more} "]"')
        several = self._parallel and not (opener == "[TOOL_CALLS]" and "[ARGS]" not in self._markers)
        marker = self._text(opener)
        if required:
            separator = f'"{between}" ' if between else ""
            return f"{marker} rest" + (f" ({separator}{marker} rest)*" if several else "")
        self.lines.append(f"FREE: {TEXT}")
        if opener in self._markers:
            self.lines.append(f"with_call: FREE {marker} rest")
        else:
            self.lines.append(f"head[lazy]: FREE {marker}")
            self.lines.append("with_call: head rest")
        return "with_call* FREE" if several else "FREE | with_call"

    def untagged(self, opener: str, required: bool) -> str:
        """Add the rules of calls that are an answer's beginning, perhaps with a marker before, and return what an
        answer is.
        """
        body = self._objects()
        more = ' ("; " call_object)*' if self._parallel else ""
        self.lines.append(f"calls: {body}{more}")
        if required:
            return "calls"
        self.lines.append(f"FREE: {NO_OBJECT}")
        tag = f" | FREE? {self._text(opener)} calls" if opener in self._markers else ""
        return f"calls | FREE{tag}"

    def _objects(self) -> str:
        begin = [
            f'{_quoted(_beginning(function.name, self._form.key))} args_{index} "}}"'
            for index, function in enumerate(self._functions)
        ]
        self.lines.append(f"call_object: {' | '.join(begin)}")
        return "call_object"

    def _text(self, marker: str) -> str:
        number = self._markers.get(marker)
        return _quoted(marker) if number is None else f"<[{number}]>"


def _beginning(name: str, key: str) -> str:
    return f'{{"name": "{name}", "{key}": '


def _quoted(text: str) -> str:
    return json.dumps(text)


def _schema(function: Function) -> str:
    parameters = ANY if function.parameters is None else function.parameters
    try:
        schema = json.loads(prepared(json.dumps(parameters, allow_nan=False)))
    except InputError as error:
        raise InputError(f"the parameters of tool {function.name!r}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"the parameters of tool {function.name!r} are no JSON schema") from error
    schema["x-guidance"] = {**schema["x-guidance"], **SPACING}
    return json.dumps(schema, ensure_ascii=False)
