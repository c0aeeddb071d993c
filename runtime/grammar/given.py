"""`Grammar`: the language that an answer must be in, as the user gives it. Making one compiles nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from runtime.errors import InputError, one_line, shown

Kind = Literal["json_schema", "regex", "lark"]

# Characters of a grammar: compiling takes time in proportion, and more are not written by hand.
MOST_TEXT = 1 << 18


@dataclass(frozen=True, slots=True)
class Grammar:
    """The language that an answer must be in, of a `kind` and with its own `text`; make one by a function below. Equal
    texts are equal grammars.

    - `json_schema`: JSON that fits a schema of draft 2020-12.
    - `json_object`: any JSON object.
    - `regex`: all of the answer matches a regular expression, in the syntax of Rust's `regex`.
    - `lark`: the language of llguidance's variant of Lark, whose first rule is `start`.

    Raises `InputError` for what is none of these at first sight, or too long; a grammar that cannot be compiled is
    refused by the request that has it.
    """

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        if len(self.text) > MOST_TEXT:
            raise InputError(
                f"the grammar has {len(self.text)} characters, and {MOST_TEXT} are allowed; give a smaller one"
            )
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the grammar is no text ({one_line(error)}); leave out what is no character") from error

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | bool | str, *, compact: bool = False) -> Grammar:
        """Return the grammar of JSON that fits `schema`, a dictionary, True, False, or the JSON of one.

        Properties come in the order of the schema. With `compact` there is no white space between them.
        """
        if isinstance(schema, str):
            if len(schema) > MOST_TEXT:
                raise InputError(
                    f"the grammar has {len(schema)} characters, and {MOST_TEXT} are allowed; give a smaller one"
                )
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise InputError(f"the schema is not JSON ({one_line(error)})") from error
        if not isinstance(schema, dict | bool):
            raise InputError(f"a JSON schema must be a dictionary, True or False, not {shown(schema)}")
        if compact:
            if isinstance(schema, bool):
                schema = {} if schema else {"not": {}}
            schema = {**schema, "x-guidance": {"whitespace_flexible": False}}
        try:
            text = json.dumps(schema, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the schema cannot be written as JSON ({one_line(error)})") from error
        return cls("json_schema", text)

    @classmethod
    def json_object(cls) -> Grammar:
        """Return the grammar of any JSON object."""
        return cls("json_schema", '{"type":"object"}')

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Return the grammar of texts that match `pattern` from their beginning to their end."""
        return cls("regex", _text("a regular expression", pattern))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Return the grammar that `text` describes."""
        return cls("lark", _text("a Lark grammar", text))


def _text(what: str, text: object) -> str:
    if not isinstance(text, str):
        raise InputError(f"{what} must be a string, not {shown(text)}")
    if not text:
        raise InputError(f"{what} cannot be empty; give one, or leave it out")
    return text
