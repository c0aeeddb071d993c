"""Run time: draft-and-verify decoding on an exported engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.answer import GenerationChunk, GenerationResult
    from runtime.errors import (
        BusyError,
        CancelledError,
        ClosedError,
        DeadlineError,
        EngineError,
        EngineFileError,
        InputError,
        InputWarning,
        PromptTooLongError,
        ServiceError,
    )
    from runtime.generator import Generator
    from runtime.grammar import Grammar
    from runtime.preparation import RequestOptions
    from runtime.prompts import Tokens
    from runtime.request import Request
    from runtime.sampling import LogitsProcessor, Sampling, TokenLogProbability
    from runtime.trace import Pass, PassNode
    from runtime.tree import TreeSizes

__all__ = [
    "BusyError",
    "CancelledError",
    "ClosedError",
    "DeadlineError",
    "EngineError",
    "EngineFileError",
    "GenerationChunk",
    "GenerationResult",
    "Generator",
    "Grammar",
    "InputError",
    "InputWarning",
    "LogitsProcessor",
    "Pass",
    "PassNode",
    "PromptTooLongError",
    "Request",
    "RequestOptions",
    "Sampling",
    "ServiceError",
    "TokenLogProbability",
    "Tokens",
    "TreeSizes",
]

# The module of each name. It is imported when the name is asked for: the programs are in this package too, and can tell
# of a Ctrl-C in one line only after they have begun.
_MODULES = {
    "GenerationChunk": "answer",
    "GenerationResult": "answer",
    "BusyError": "errors",
    "CancelledError": "errors",
    "ClosedError": "errors",
    "DeadlineError": "errors",
    "EngineError": "errors",
    "EngineFileError": "errors",
    "InputError": "errors",
    "InputWarning": "errors",
    "PromptTooLongError": "errors",
    "ServiceError": "errors",
    "Request": "request",
    "RequestOptions": "preparation",
    "Tokens": "prompts",
    "Generator": "generator",
    "Grammar": "grammar",
    "LogitsProcessor": "sampling",
    "Pass": "trace",
    "PassNode": "trace",
    "Sampling": "sampling",
    "TokenLogProbability": "sampling",
    "TreeSizes": "tree",
}


def __getattr__(name: str) -> object:
    """Return the public `name`."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"runtime.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
