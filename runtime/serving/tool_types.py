"""Tools as clients give them and calls as they get them, as OpenAI's API has both."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

FunctionName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
# Calls of earlier answers, which may be others'.
CalledName = Annotated[str, Meta(min_length=1, max_length=256)]
Description = Annotated[str, Meta(max_length=1 << 16)]
CallId = Annotated[str, Meta(min_length=1, max_length=256)]
ArgumentsText = Annotated[str, Meta(max_length=1 << 24, description="JSON.")]
Parameters = Annotated[
    dict[str, Any],
    Meta(description="A JSON schema of type object, of draft 2020-12; a function without takes no arguments."),
]
Strict = Annotated[
    bool | None,
    Meta(description="Arguments fit the schema with tool_choice auto, too; forced ones always do."),
]


class FunctionDefinition(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a model is told of a function."""

    name: FunctionName
    description: Description | None = None
    parameters: Parameters | None = None
    strict: Strict = None


class FunctionTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="function"):
    """A function that the model may call."""

    function: FunctionDefinition


class FunctionReference(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The name of a function."""

    name: FunctionName


class NamedChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="function"):
    """The function that is to be called."""

    function: FunctionReference


class FlatFunctionTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="function"):
    """A function that the model may call, as responses have it."""

    name: FunctionName
    description: Description | None = None
    parameters: Parameters | None = None
    strict: Strict = None


class FlatChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="function"):
    """The function that is to be called, as responses have it."""

    name: FunctionName


FlatTools = Annotated[list[FlatFunctionTool], Meta(max_length=128)]
FlatToolChoice = Literal["none", "auto", "required"] | FlatChoice
Tools = Annotated[list[FunctionTool], Meta(max_length=128)]
Choice = Literal["none", "auto", "required"] | NamedChoice


class CalledFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What was called, and with what."""

    name: CalledName
    arguments: ArgumentsText
    # What OpenAI's client makes of a streamed call.
    parsed_arguments: Annotated[Any, Meta(description="No effect.")] = msgspec.UNSET


class ToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="function"):
    """A call of a function, in an answer and in the message that it becomes."""

    id: CallId
    function: CalledFunction
    # Of a streamed call that was put together.
    index: int | msgspec.UnsetType = msgspec.UNSET


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds to a call: its name first, then parts of its arguments."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds to call `index`: its id, type and name come once."""

    index: int | None = None
    function: FunctionDelta | None = None
    id: str | None = None
    type: Literal["function"] | None = None
