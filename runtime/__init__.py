"""Run time: draft-and-verify decoding on an exported engine."""

from runtime.answer import GenerationChunk, GenerationResult
from runtime.errors import EngineFileError, InputError, PromptTooLongError
from runtime.generator import Generator
from runtime.sampling import LogitsProcessor, Sampling, TokenLogProbability
from runtime.tree import TreeSizes

__all__ = [
    "EngineFileError",
    "GenerationChunk",
    "GenerationResult",
    "Generator",
    "InputError",
    "LogitsProcessor",
    "PromptTooLongError",
    "Sampling",
    "TokenLogProbability",
    "TreeSizes",
]
