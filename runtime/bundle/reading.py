"""Reading an engine's files: all of what the runtime needs besides what runs the graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.bundle.engine_file import EngineFile, read_engine_file
from runtime.chat import ChatTemplate
from runtime.drafting.correction import TABLES, TokenCorrection
from runtime.drafting.reliability import Reliability
from runtime.errors import EngineFileError
from runtime.formats import Format
from runtime.tokenizer import TOKENIZER, parse_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHAT_TEMPLATE = Format("chat_template.jinja", 1 << 20, "export the engine again", EngineFileError)


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
    about.graph.check(folder, contents=True)
    if about.weights:
        about.weights.check(folder, contents=verify_weights)
    where, content = about.tokenizer.read(folder, TOKENIZER)
    tokenizer = parse_tokenizer(content, where, about.dims.vocab_size)
    chat = None
    if about.chat_template:
        where, content = about.chat_template.read(folder, CHAT_TEMPLATE)
        chat = ChatTemplate(CHAT_TEMPLATE.text_of(content, where), about.special_tokens)
    correction = None
    if about.correction:
        where, content = about.correction.read(folder, TABLES)
        correction = TokenCorrection.of(content, where, about.dims.vocab_size, about.dims.num_steps)
    return Bundle(about, tokenizer, chat, correction, Reliability.of(about.transfer.get("acceptance", {})))
