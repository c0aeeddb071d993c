"""Calls of tools in answers: what the generator is asked for them, and how clients are told of them."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from runtime.errors import InputError
from runtime.generator import Generator
from runtime.grammar import Grammar
from runtime.sampling import Sampling
from runtime.serving.errors import ApiError
from runtime.serving.replies import Finish
from runtime.tools import ArgumentsPart, CallBegun, CallEnded, Content, ParsedAnswer, ToolFormat

LETTERS = string.ascii_letters + string.digits


class Described(Protocol):
    """A function as a request describes it."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


@dataclass(frozen=True)
class Calling:
    """How the answers of a request call `tools`, as the generator takes them: `named` says that a function was chosen
    by its name, `grammar` what answers must be, None for free text.
    """

    form: ToolFormat
    tools: list[dict[str, Any]]
    names: frozenset[str]
    grammar: Grammar | None
    named: bool

    def sampling(self, sampling: Sampling) -> Sampling:
        """Return `sampling` within the grammar. Raises `ApiError` where that cannot be."""
        if self.grammar is None:
            return sampling
        try:
            return replace(sampling, grammar=self.grammar)
        except InputError as error:
            raise _unfit("tool_choice", str(error)) from error

    def parsed(self, text: str) -> ParsedAnswer:
        """Return the texts and the calls of a whole answer."""
        return self.form.parse(text, self.names)

    def new_id(self) -> str:
        """Return the id of a new call, of the kind that the model's template takes."""
        return self.form.id_prefix + "".join(secrets.choice(LETTERS) for _ in range(self.form.id_length))

    def finish(self, finish: Finish, calls: int) -> Finish:
        """Return why an answer with so many calls ended: as with OpenAI, one whose function was named by `stop`."""
        return "tool_calls" if calls and finish == "stop" and not self.named else finish


def calling_of(
    generator: Generator,
    functions: Sequence[Described],
    choice: str | None,
    name: str | None,
    *,
    parallel: bool,
    shaped: bool,
    enabled: bool,
) -> Calling | None:
    """Return how answers call `functions`, None where they call none: by the `choice` "auto", "none" or "required", or
    by the `name` of one. `shaped` says that answers shall have another format. Raises `ApiError` for what cannot be.
    """
    if not functions:
        if name is not None or choice == "required":
            raise _unfit(
                "tool_choice", "tool_choice asks for a call, and there are no tools; give some, or leave it out"
            )
        return None
    if not enabled:
        raise _unfit("tools", "this server takes no calls of tools out of answers; leave tools out")
    if choice == "none":
        return None
    names = frozenset(function.name for function in functions)
    if name is not None and name not in names:
        raise _unfit("tool_choice", f"tool_choice names {name!r}, and the tools are {', '.join(sorted(names))}")
    if shaped:
        raise _unfit(
            "tools",
            "an answer that may call tools has no other format; leave tools or the format out, or set "
            "tool_choice to none",
        )
    tools = [{"type": "function", "function": _told(function)} for function in functions]
    required = name is not None or choice == "required"
    strict = any(function.strict for function in functions)
    grammar = None
    if required or strict or not parallel:
        try:
            grammar = generator.tool_grammar(tools, name=name, required=required, parallel=parallel)
        except InputError as error:
            raise _unfit("tools", str(error)) from error
    return Calling(generator.tool_format, tools, names, grammar, name is not None)


class CallStream:
    """One answer of a `calling` as its text comes: `calls` counts the calls that have begun."""

    def __init__(self, calling: Calling) -> None:
        self._parser = calling.form.parser(calling.names)
        self._calling = calling
        self.calls = 0

    def events(self, text: str, *, last: bool) -> list[Content | CallBegun | ArgumentsPart | CallEnded]:
        """Return what is certain by more text, the `last` of it or not."""
        found = self._parser.push(text)
        if last:
            found += self._parser.finish()
        self.calls += sum(isinstance(event, CallBegun) for event in found)
        return found


def _told(function: Described) -> dict[str, Any]:
    about = {"description": function.description, "parameters": function.parameters, "strict": function.strict}
    return {"name": function.name, **{key: value for key, value in about.items() if value is not None}}


def _unfit(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
