"""Tools: calls of functions in an answer's text, in the formats that models have, and grammars that force them."""

from runtime.tools.formats import FORMATS, HERMES, LLAMA3, MISTRAL, ToolFormat
from runtime.tools.parsing import ArgumentsPart, Call, CallBegun, CallEnded, Content, ParsedAnswer

__all__ = [
    "FORMATS",
    "HERMES",
    "LLAMA3",
    "MISTRAL",
    "ArgumentsPart",
    "Call",
    "CallBegun",
    "CallEnded",
    "Content",
    "ParsedAnswer",
    "ToolFormat",
]
