"""Structured answers: the fields that ask for one, and the grammar that they ask for."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from runtime.errors import InputError, one_line
from runtime.grammar import Grammar
from runtime.grammar.given import MOST_TEXT
from runtime.serving.errors import ApiError

SchemaName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
# As it came: whoever compiles it reads it, in a thread of its own.
Schema = Annotated[
    msgspec.Raw,
    Meta(
        description=f"A JSON schema of draft 2020-12, of up to {MOST_TEXT} bytes.",
        extra_json_schema={"type": ["object", "boolean"]},
    ),
]
Pattern = Annotated[str, Meta(min_length=1, max_length=MOST_TEXT)]
Strict = Annotated[bool | None, Meta(description="No effect: answers always fit.")]
About = Annotated[Annotated[str, Meta(max_length=1 << 16)] | None, Meta(description="No effect.")]


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="text"):
    """Answers are text."""


class JsonObject(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="json_object"):
    """Answers are JSON objects."""


class NamedSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A schema, as chats have it."""

    name: SchemaName
    schema: Schema
    description: About = None
    strict: Strict = None


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="json_schema"):
    """Answers are JSON that fits a schema."""

    json_schema: NamedSchema


class FlatJsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="json_schema"):
    """Answers are JSON that fits a schema, as responses have it."""

    name: SchemaName
    schema: Schema
    description: About = None
    strict: Strict = None


Format = TextFormat | JsonObject | JsonSchema | FlatJsonSchema


def grammar_of(given: Format | None, where: str, grammar: str | None, regex: str | None) -> Grammar | None:
    """Return the grammar that a request asks for by a format, which is at `where`, by a `grammar` or by a `regex`; None
    where it asks for none. Raises `ApiError` where it asks for several.
    """
    asked = [
        name
        for name, there in (
            (where, given is not None and not isinstance(given, TextFormat)),
            ("grammar", grammar is not None),
            ("regex", regex is not None),
        )
        if there
    ]
    if len(asked) > 1:
        raise ApiError(
            400,
            f"{' and '.join(asked)} cannot be had together: an answer has one grammar; give one of them",
            param=asked[0],
            code="invalid_value",
        )
    try:
        if grammar is not None:
            return Grammar.lark(grammar)
        if regex is not None:
            return Grammar.regex(regex)
        if isinstance(given, JsonObject):
            return Grammar.json_object()
        if isinstance(given, JsonSchema):
            return _schema(given.json_schema.schema)
        if isinstance(given, FlatJsonSchema):
            return _schema(given.schema)
    except InputError as error:
        raise ApiError(400, str(error), param=asked[0], code="invalid_value") from error
    return None


def _schema(schema: msgspec.Raw) -> Grammar:
    try:
        return Grammar("json_schema", bytes(schema).decode())
    except UnicodeDecodeError as error:
        raise InputError(f"the schema is not JSON ({one_line(error)})") from error
