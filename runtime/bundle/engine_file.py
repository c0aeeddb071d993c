"""`engine.json`: what an engine is, written by the exporter and checked by the runtime before anything is loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from runtime.bindings import GraphDims
from runtime.bundle.places import candidates, engine_file_path
from runtime.drafting.foresight import Foresight
from runtime.drafting.reliability import Reliability
from runtime.errors import EngineFileError
from runtime.files import sha256_file, write_json
from runtime.formats import Format, JsonFormat, check_levels
from runtime.tree import TreeSizes

FORMAT = "hidden-transfer-engine"
# Engines without a draft head are of the first of these, as before. Releases that know no other would take the draft
# logits of such a head for those of other tokens.
FORMAT_VERSION, DRAFT_HEAD_VERSION = 4, 5
MOST_BYTES = 1 << 22
CAPACITY_STEP = 64

# Bytes of a file name that file systems take.
LONGEST_NAME = 255
# Tokens of a prompt chunk, and rows of a pass in all: what every row may see takes the square of them in bytes.
MOST_CHUNK = 1 << 14
MOST_PASS_ROWS = 1 << 15
# More tokens of context than any model has.
MOST_CONTEXT = 1 << 24
MOST_BATCH = 1 << 10
# What 64 bits hold, as the sizes of files do.
LARGEST = (1 << 63) - 1

Attention = Literal["plugin", "native"]
Chunk = Annotated[int, Meta(ge=1, le=MOST_CHUNK)]
Context = Annotated[int, Meta(ge=1, le=MOST_CONTEXT)]
# What the field `bytes` of a record hides.
Content = bytes
Capability = tuple[Annotated[int, Meta(ge=0, le=1000)], Annotated[int, Meta(ge=0, le=1000)]]


@dataclass(frozen=True)
class FileRecord:
    """A file beside `engine.json`, by name, size in bytes and SHA-256. A name that leads elsewhere raises
    `ValueError`; a link of that name is followed.
    """

    name: str
    bytes: Annotated[int, Meta(ge=1, le=LARGEST)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or any(one < " " or one in "/\\\x7f" for one in self.name):
            raise ValueError(f"{self.name!r} is not the bare name of a file")
        if len(os.fsencode(self.name)) > LONGEST_NAME:
            raise ValueError(f"a file name of more than {LONGEST_NAME} bytes: {self.name[:20]!r}...")

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Return the record of `path`."""
        return cls(path.name, path.stat().st_size, sha256_file(path))

    def open(self, engine: Path, *, contents: bool) -> BufferedReader:
        """Return the file of this record that belongs to `engine`, open at its beginning: it stays that file, whatever
        is put in its place.

        Raises `EngineFileError` when it is missing, of another size or, when `contents` is asked for, of another hash.
        """
        file = self._opened(engine)
        try:
            fits = os.fstat(file.fileno()).st_size == self.bytes
            if fits and contents:
                fits = hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
                file.seek(0)
        except OSError as error:
            raise self._unreadable(file.name, error) from error
        if not fits:
            file.close()
            raise self._unfit(file.name)
        return file

    def read(self, engine: Path, kind: Format) -> tuple[Path, Content]:
        """Return the file's path and its content, of the format `kind`, read once. Raises `EngineFileError` as `open`
        does for all that the file is, and what `kind` raises.
        """
        with self.open(engine, contents=False) as file:
            path = Path(file.name)
            content = kind.content_of(file, path)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise self._unfit(path)
        return path, content

    def _opened(self, engine: Path) -> BufferedReader:
        for path in candidates(engine, self.name):
            try:
                # Before it is opened: opening a pipe waits for whoever writes into it.
                if stat.S_ISREG(path.stat().st_mode):
                    return path.open("rb")
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise self._unreadable(path, error) from error
        raise EngineFileError(
            f"{engine.parent / self.name} is missing; copy all files of the engine together, or export it again"
        )

    @staticmethod
    def _unreadable(path: Path | str, error: OSError) -> EngineFileError:
        return EngineFileError(
            f"{path} cannot be read ({error.strerror or error}); make it readable, or copy or export it again"
        )

    def _unfit(self, path: Path | str) -> EngineFileError:
        # Neither size nor hash: whoever wrote the description may name any file that can be read here.
        return EngineFileError(
            f"{path} is not the file that engine.json describes: it is incomplete, damaged or exchanged; copy or "
            "export it again"
        )


@dataclass(frozen=True)
class Limits:
    """The limits of a plan: requests at once, tokens of context, tree rows of a pass (and pseudo rows of each step),
    tokens of a prompt chunk.
    """

    max_batch: Annotated[int, Meta(ge=1, le=MOST_BATCH)]
    max_context: Context
    max_rows: Annotated[int, Meta(ge=1, le=MOST_PASS_ROWS)]
    chunk: Chunk

    @property
    def capacity(self) -> int:
        """The largest S: a pass that begins within the context may accept all its rows.

        Rounded up, so that the keys and values of every layer start where TensorRT wants addresses to.
        """
        return -(-(self.max_context + self.max_rows) // CAPACITY_STEP) * CAPACITY_STEP


@dataclass(frozen=True)
class PlanFile:
    """A TensorRT plan: the product and version that built it, the GPUs and limits that it is for.

    `kernels` are those that the runtime itself runs; `build` tells seconds, peak memory in bytes, and what the engine's
    layers are.
    """

    product: str
    version: str
    compute_capabilities: Annotated[tuple[Capability, ...], Meta(min_length=1)]
    attention: Attention
    plugin_version: str | None
    limits: Limits
    profiles: dict[str, dict[str, list[list[int]]]]
    kernels: FileRecord
    build: dict[str, Any]


@dataclass(frozen=True)
class EngineFile:
    """The contents of `engine.json`. Lengths are in tokens.

    `graph` is the engine itself: an ONNX graph, whose weights are in a file of their own, or a plan, which has them.
    `cpu_graph` is the same graph lowered for ONNX Runtime on the CPU, with the same weights file. `precision` is that
    of the weights: "float32", "float16", "bfloat16", "int8" or "int4". `draft_tokens` has the tokens that draft logits
    are of, where `dims` has a head for them. What cannot be together raises `ValueError`.
    """

    dims: GraphDims
    precision: str
    tree: TreeSizes
    prompt_chunk: Chunk
    max_context: Context
    # A model may name tokens beyond its vocabulary: it never chooses them.
    stop_tokens: tuple[Annotated[int, Meta(ge=0, le=LARGEST)], ...]
    special_tokens: dict[str, str]
    graph: FileRecord
    cpu_graph: FileRecord | None
    weights: FileRecord | None
    tokenizer: FileRecord
    chat_template: FileRecord | None
    correction: FileRecord | None
    base_model: dict[str, Any]
    transfer: dict[str, Any]
    versions: dict[str, str]
    parity: dict[str, Any]
    plan: PlanFile | None = None
    draft_tokens: FileRecord | None = None

    def __post_init__(self) -> None:
        if (self.draft_tokens is None) != (self.dims.draft_size is None):
            raise ValueError("draft_size and draft_tokens: an engine has both, or neither")
        steps = self.dims.num_steps
        self.tree.check(steps)
        if self.plan:
            most = self.plan.limits.max_rows
            if most * (1 + steps) > MOST_PASS_ROWS:
                raise ValueError(f"max_rows {most}: a pass has at most {MOST_PASS_ROWS} rows in all")
            if self.tree.tree_rows > most:
                raise ValueError(f"tree_rows {self.tree.tree_rows}, and the plan was built for max_rows {most}")
        for part in (self.base_model, self.transfer, self.parity, self.plan and self.plan.build):
            check_levels(part)
        acceptance = self.transfer.get("acceptance", {})
        Reliability.of(acceptance)
        Foresight.of(acceptance)

    @property
    def computed_in(self) -> str:
        """The precision of everything but products with quantised weights, as `--precision` names it."""
        return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[self.dims.dtype]

    @property
    def identity(self) -> str:
        """A SHA-256 of all that decides how fast the engine is and how good its drafts are: graph, weights, transfer
        layers, default sizes.
        """
        files = (self.graph, self.cpu_graph, self.weights, self.correction)
        hashes = [file and file.sha256 for file in files]
        if self.draft_tokens:
            # Not in the place of others: engines without keep the identity that earlier releases know them by.
            hashes.append(self.draft_tokens.sha256)
        parts = [hashes, asdict(self.tree), self.transfer]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write this as JSON, atomically."""
        version = FORMAT_VERSION if self.draft_tokens is None else DRAFT_HEAD_VERSION
        write_json(path, {"format": FORMAT, "version": version, **asdict(self)})


@dataclass(frozen=True)
class Header:
    """The fields of `engine.json` that tell how to read the others."""

    format: str
    version: int


HEADER = JsonFormat("engine.json header", MOST_BYTES, "export the engine again", EngineFileError, kind=Header)
ENGINE = JsonFormat("engine.json", MOST_BYTES, "export the engine again", EngineFileError, kind=EngineFile)


@dataclass(frozen=True)
class Description:
    """The bytes of `engine.json`, and where they were read."""

    path: Path
    content: bytes

    def parse(self) -> EngineFile:
        """Return what they say. Raises `EngineFileError` when they are damaged or of another version."""
        header = HEADER.decode(self.content, self.path)
        if header.format != FORMAT:
            raise EngineFileError(f"{self.path} does not describe a hidden-transfer engine; export the engine again")
        if header.version not in (FORMAT_VERSION, DRAFT_HEAD_VERSION):
            raise EngineFileError(
                f"{self.path} is of version {header.version}, and this runtime reads versions {FORMAT_VERSION} and "
                f"{DRAFT_HEAD_VERSION}; update hidden-transfer, or export the engine again"
            )
        return ENGINE.decode(self.content, self.path)


def find_description(engine: Path) -> Description:
    """Return what describes `engine` now. Raises `EngineFileError` where nothing does."""
    missing = EngineFileError(f"no engine at {engine}; make one with: ht-export MODEL --out engine.onnx")
    if not engine.name:
        raise missing
    moving, placed = candidates(engine, engine_file_path(engine).name)
    # It is moved once: what is not in one place now is in the other.
    if _is_file(moving):
        with contextlib.suppress(EngineFileError):
            return Description(moving, ENGINE.content(moving))
    if not any(map(_is_file, candidates(engine, engine.name))):
        if engine.is_dir():
            raise EngineFileError(f"{engine} is a folder; name the engine in it, such as {engine / 'engine.onnx'}")
        raise missing
    if not _is_file(placed):
        raise EngineFileError(f"{placed} is missing beside {engine}; copy it along, or export the engine again")
    return Description(placed, ENGINE.content(placed))


def read_engine_file(engine: Path) -> EngineFile:
    """Read the description of `engine`. Raises `EngineFileError` when it is missing, damaged or of a newer version."""
    return find_description(engine).parse()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        # A name too long, or a folder that may not be looked into.
        raise EngineFileError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
