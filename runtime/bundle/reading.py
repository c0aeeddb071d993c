"""Reading an engine's files: all of what the runtime needs besides what runs the graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.bundle.engine_file import EngineFile, read_engine_file
from runtime.chat import ChatTemplate
from runtime.chat.process import TemplateProcess
from runtime.drafting.correction import TokenCorrection
from runtime.drafting.reliability import Reliability
from runtime.errors import EngineFileError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Bundle:
    """The files beside an engine, read and checked; None for those that not every engine has."""

    about: EngineFile
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    correction: TokenCorrection | None
    reliability: Reliability | None


def read_bundle(path: Path, *, verify_weights: bool = True) -> Bundle:
    """Read the files of the engine at `path`. Their sizes and hashes are checked, but with `verify_weights` False not
    the hash of the weights.

    Raises `EngineFileError` when a file is missing, damaged, or of another version.
    """
    about = read_engine_file(path)
    folder = path.parent
    if about.graph.name != path.name:
        raise EngineFileError(
            f"{path.with_suffix('.json')} describes {about.graph.name}, not {path.name}; export it again"
        )
    # Begun first: it starts while the weights are hashed.
    process = TemplateProcess() if about.chat_template else None
    about.graph.check(folder, contents=True)
    if about.weights:
        about.weights.check(folder, contents=verify_weights)
    tokenizer = _read_tokenizer(about.tokenizer.check(folder, contents=True))
    chat = None
    if about.chat_template:
        template = about.chat_template.check(folder, contents=True).read_text(encoding="utf-8")
        chat = ChatTemplate(template, about.special_tokens, process=process)
    correction = None
    if about.correction:
        tables = about.correction.check(folder, contents=True)
        correction = TokenCorrection.read(tables, about.dims.vocab_size, about.dims.num_steps)
    return Bundle(about, tokenizer, chat, correction, Reliability.of(about.transfer.get("acceptance", {})))


def _read_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise EngineFileError(f"{path} is not a tokenizer ({error}); export the engine again") from error
