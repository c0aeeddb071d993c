"""`engine.json`: what an engine is, written by the exporter and checked by the runtime before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.bindings import GraphDims
from runtime.drafting.reliability import Reliability
from runtime.errors import EngineFileError
from runtime.files import sha256_file, write_json
from runtime.tree import MOST_ROWS, TreeSizes

FORMAT = "hidden-transfer-engine"
FORMAT_VERSION = 4
CAPACITY_STEP = 64


@dataclass(frozen=True)
class FileRecord:
    """A file beside `engine.json`, by name, size in bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Return the record of `path`."""
        return cls(path.name, path.stat().st_size, sha256_file(path))

    def check(self, folder: Path, *, contents: bool) -> Path:
        """Return the file's path; raise `EngineFileError` when it is missing, of another size or, when `contents`
        is asked for, of another hash.
        """
        path = folder / self.name
        if not path.is_file():
            raise EngineFileError(f"{path} is missing; copy all files of the engine together, or export it again")
        size = path.stat().st_size
        if size != self.bytes:
            raise EngineFileError(
                f"{path} has {size} bytes where {self.bytes} are expected; it is incomplete, copy or export it again"
            )
        if contents and (found := sha256_file(path)) != self.sha256:
            raise EngineFileError(
                f"{path} is damaged: its SHA-256 is {found[:12]}... where {self.sha256[:12]}... is expected; "
                "copy or export it again"
            )
        return path


@dataclass(frozen=True)
class Limits:
    """The limits of a plan: requests at once, tokens of context, tree rows of a pass (and pseudo rows of each step),
    tokens of a prompt chunk.
    """

    max_batch: int
    max_context: int
    max_rows: int
    chunk: int

    @property
    def capacity(self) -> int:
        """The largest S: a pass that begins within the context may accept all its rows.

        Rounded up, so that the keys and values of every layer start where TensorRT wants addresses to.
        """
        return -(-(self.max_context + self.max_rows) // CAPACITY_STEP) * CAPACITY_STEP


@dataclass(frozen=True)
class PlanFile:
    """A TensorRT plan: the product and version that built it, the GPUs and limits that it is for.

    `attention` is "plugin" or "native"; `kernels` are those that the runtime itself runs; `build` tells seconds, peak
    memory in bytes, and what the engine's layers are.
    """

    product: str
    version: str
    compute_capabilities: tuple[tuple[int, int], ...]
    attention: str
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
    of the weights: "float32", "float16", "bfloat16", "int8" or "int4".
    """

    dims: GraphDims
    precision: str
    tree: TreeSizes
    prompt_chunk: int
    max_context: int
    stop_tokens: tuple[int, ...]
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
        parts = [[file and file.sha256 for file in files], asdict(self.tree), self.transfer]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write this as JSON, atomically."""
        write_json(path, {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)})


def engine_file_path(engine: Path) -> Path:
    """Return where the description of `engine` is: `engine.onnx` has `engine.json` beside it."""
    return engine.with_suffix(".json")


def read_engine_file(engine: Path) -> EngineFile:
    """Read the description of `engine`. Raises `EngineFileError` when it is missing, damaged or of a newer version."""
    if not engine.is_file():
        raise EngineFileError(f"no engine at {engine}; make one with: ht-export MODEL --out engine.onnx")
    path = engine_file_path(engine)
    if not path.is_file():
        raise EngineFileError(f"{path} is missing beside {engine}; copy it along, or export the engine again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EngineFileError(f"{path} is not valid JSON ({error}); export the engine again") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise EngineFileError(f"{path} does not describe a hidden-transfer engine; export the engine again")
    if value.get("version") != FORMAT_VERSION:
        raise EngineFileError(
            f"{path} is of version {value.get('version')}, and this runtime reads version {FORMAT_VERSION}; "
            "update hidden-transfer, or export the engine again"
        )
    try:
        about = _parse(value)
        _check_numbers(about)
        if not isinstance(about.transfer, dict):
            raise ValueError(f"transfer ({about.transfer!r})")
        Reliability.of(about.transfer.get("acceptance", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise EngineFileError(f"{path} lacks or misstates {error}; export the engine again") from error
    return about


def _check_numbers(about: EngineFile) -> None:
    """Raise `ValueError`, naming the field, unless the numbers that steer decoding can be what they say."""
    dims = asdict(about.dims)
    numbers = [
        ("prompt_chunk", about.prompt_chunk, 1),
        ("max_context", about.max_context, 1),
        ("tree_rows", about.tree.tree_rows, 1),
        *(("pseudo_rows", rows, 0) for rows in about.tree.pseudo_rows),
        *(("stop_tokens", token, 0) for token in about.stop_tokens),
        *(("transfer_layers", layer, 0) for layer in dims.pop("transfer_layers")),
        *((name, size, 1) for name, size in dims.items() if name != "dtype"),
    ]
    for name, number, least in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(f"{name} ({number!r})")
    if about.tree.tree_rows > MOST_ROWS:
        raise ValueError(f"tree_rows ({about.tree.tree_rows}, more than {MOST_ROWS})")
    texts = about.special_tokens
    if not isinstance(texts, dict) or not all(isinstance(text, str) for pair in texts.items() for text in pair):
        raise ValueError(f"special_tokens ({texts!r})")
    if len(about.tree.pseudo_rows) != about.dims.num_steps:
        raise ValueError(f"pseudo_rows ({list(about.tree.pseudo_rows)})")


def _parse(value: dict[str, Any]) -> EngineFile:
    fields = {key: item for key, item in value.items() if key not in ("format", "version")}
    dims = fields["dims"]
    template, correction = fields["chat_template"], fields["correction"]
    return EngineFile(
        **{
            **fields,
            "dims": GraphDims(**{**dims, "transfer_layers": tuple(dims["transfer_layers"])}),
            "tree": TreeSizes(fields["tree"]["tree_rows"], tuple(fields["tree"]["pseudo_rows"])),
            "stop_tokens": tuple(fields["stop_tokens"]),
            "graph": FileRecord(**fields["graph"]),
            "cpu_graph": FileRecord(**fields["cpu_graph"]) if fields["cpu_graph"] else None,
            "weights": FileRecord(**fields["weights"]) if fields["weights"] else None,
            "tokenizer": FileRecord(**fields["tokenizer"]),
            "chat_template": FileRecord(**template) if template else None,
            "correction": FileRecord(**correction) if correction else None,
            "plan": _parse_plan(fields["plan"]) if fields["plan"] else None,
        }
    )


def _parse_plan(fields: dict[str, Any]) -> PlanFile:
    limits = Limits(**fields["limits"])
    for name, limit in asdict(limits).items():
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"{name} ({limit!r})")
    capabilities = tuple((int(major), int(minor)) for major, minor in fields["compute_capabilities"])
    kernels = FileRecord(**fields["kernels"])
    return PlanFile(**{**fields, "limits": limits, "compute_capabilities": capabilities, "kernels": kernels})
