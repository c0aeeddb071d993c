"""Reading an engine's files: all of what the runtime needs besides what runs the graph."""

from __future__ import annotations

from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.arrays import IntArray
from runtime.bundle.engine_file import EngineFile, find_description
from runtime.chat import ChatTemplate
from runtime.chat.process import TemplateProcess
from runtime.drafting.correction import TABLES, TokenCorrection
from runtime.drafting.draft_tokens import DRAFT_TOKENS, read_draft_tokens
from runtime.drafting.foresight import Foresight
from runtime.drafting.reliability import Reliability
from runtime.errors import EngineFileError
from runtime.formats import Format
from runtime.tokenizer import TOKENIZER, parse_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHAT_TEMPLATE = Format("chat_template.jinja", 1 << 20, "export the engine again", EngineFileError)
# What protocol buffers can hold.
GRAPH = Format("graph", (1 << 31) - 1, "export the engine again", EngineFileError)
KERNELS = Format("kernels.bin", 1 << 26, "export the engine again", EngineFileError)
# An engine may be replaced while it is read, and then is read again.
ATTEMPTS = 20


@dataclass(frozen=True)
class EngineFiles:
    """The files that an engine is run from: small ones as bytes, large ones open. All are those that one export wrote,
    and stay so whatever is put in their places.

    A plan has `plan` and `kernels`, a graph has `graph`, `weights` and perhaps `cpu_graph`. As a context manager they
    are closed at the end, when the engine has been opened.
    """

    path: Path
    graph: bytes = b""
    cpu_graph: bytes | None = None
    weights: BufferedReader | None = None
    plan: BufferedReader | None = None
    kernels: bytes = b""

    def __enter__(self) -> EngineFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.weights, self.plan):
            if file is not None:
                file.close()


@dataclass(frozen=True)
class Bundle:
    """The files of an engine, read and checked; None for those that not every engine has. `draft_tokens` [V_d] are the
    tokens that draft logits are of, None for the whole vocabulary.
    """

    about: EngineFile
    files: EngineFiles
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    correction: TokenCorrection | None
    reliability: Reliability | None
    foresight: Foresight
    draft_tokens: IntArray | None


def read_bundle(path: Path, *, verify_weights: bool = True) -> Bundle:
    """Read the files of the engine at `path`. Their sizes and hashes are checked, but with `verify_weights` False not
    the hash of the weights.

    Raises `EngineFileError` when a file is missing, damaged, or of another version.
    """
    for _ in range(ATTEMPTS):
        description = find_description(path)
        try:
            bundle = _read(path, description.parse(), verify_weights)
        except EngineFileError:
            if find_description(path).content == description.content:
                raise
            continue
        # Files that were opened while it described the engine are that engine's, checked or not.
        if find_description(path).content == description.content:
            return bundle
        bundle.files.__exit__()
    raise EngineFileError(f"{path} was replaced {ATTEMPTS} times while it was read; load it when that is over")


def _read(path: Path, about: EngineFile, verify_weights: bool) -> Bundle:
    if about.graph.name != path.name:
        raise EngineFileError(
            f"{path.with_suffix('.json')} describes {about.graph.name}, not {path.name}; export it again"
        )
    # Begun first: it starts while the weights are hashed.
    process = TemplateProcess() if about.chat_template else None
    files = _open(path, about, verify_weights)
    where, content = about.tokenizer.read(path, TOKENIZER)
    tokenizer = parse_tokenizer(content, where, about.dims.vocab_size)
    chat = None
    if about.chat_template:
        where, content = about.chat_template.read(path, CHAT_TEMPLATE)
        chat = ChatTemplate(CHAT_TEMPLATE.text_of(content, where), about.special_tokens, process=process)
    correction = None
    if about.correction:
        where, content = about.correction.read(path, TABLES)
        correction = TokenCorrection.of(content, where, about.dims.vocab_size, about.dims.num_steps)
    acceptance = about.transfer.get("acceptance", {})
    reliability, foresight = Reliability.of(acceptance), Foresight.of(acceptance)
    draft_tokens = None
    if about.draft_tokens:
        where, content = about.draft_tokens.read(path, DRAFT_TOKENS)
        draft_tokens = read_draft_tokens(content, where, about.dims.draft_width, about.dims.vocab_size)
    return Bundle(about, files, tokenizer, chat, correction, reliability, foresight, draft_tokens)


def _open(path: Path, about: EngineFile, verify_weights: bool) -> EngineFiles:
    if about.plan:
        _, kernels = about.plan.kernels.read(path, KERNELS)
        return EngineFiles(path, plan=about.graph.open(path, contents=True), kernels=kernels)
    _, graph = about.graph.read(path, GRAPH)
    cpu_graph = about.cpu_graph.read(path, GRAPH)[1] if about.cpu_graph else None
    weights = about.weights.open(path, contents=verify_weights) if about.weights else None
    return EngineFiles(path, graph, cpu_graph, weights)
