"""The forms of one model that peers run, made when they are first needed and kept in a folder."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from ht_export.bench.peers import gguf_files
from ht_export.bench.peers.kinds import ENGINE, EXPORTS, GGUF, MADE, PeerKind
from ht_export.bench.peers.process import MissingError, PeerError, Worker, command_of, environment_of
from runtime.errors import InputError, one_line
from runtime.files import write_json
from runtime.formats import JsonFormat

# Seconds that a conversion may take.
CONVERSION = 3600.0
DESCRIPTION = "model.json"


@dataclass(frozen=True)
class Described:
    """What is known of the model without reading its weights again."""

    name: str
    weights_sha256: str
    stop_tokens: list[Annotated[int, Meta(ge=0, le=1 << 31)]]
    max_context: Annotated[int, Meta(ge=1, le=1 << 40)]
    vocabulary: Annotated[int, Meta(ge=1, le=1 << 31)]


DESCRIBED = JsonFormat(
    "description of a model made ready for peers",
    most_bytes=1 << 20,
    remedy="delete its folder, and it is made again",
    kind=Described,
)


@dataclass(frozen=True)
class Forms:
    """The forms of `source`, a model as `load_base_model` takes it, in `folder`. `gguf` is a GGUF file of the model,
    where there is one; `transfer` has the transfer layers of our exports, None for those that are shipped.
    """

    source: str
    folder: Path
    about: Described
    gguf: Path | None
    transfer: Path | None

    @property
    def checkpoint(self) -> Path:
        """The folder with the model in float32, as Hugging Face's libraries read it."""
        return self.folder / "checkpoint"

    def find(self, kind: PeerKind, precision: str, threads: int, python: str | None) -> Path:
        """Return what this peer runs in this precision, which is made where it is not there yet. Raises `PeerError`."""
        form = kind.forms[precision]
        if form == ENGINE:
            return self._engine(precision)
        if form == GGUF and self.gguf is None and MADE in kind.forms.values():
            form = MADE
        if form == GGUF:
            return self._gguf(precision)
        return self._made(kind, precision, threads, python) if form == MADE else self.checkpoint

    def _gguf(self, precision: str) -> Path:
        if self.gguf is None:
            raise PeerError("it reads GGUF files, and the model is none; give one of the same weights with --gguf")
        if gguf_files.has_precision(self.gguf, precision):
            return self.gguf
        path = self.folder / f"{precision}.gguf"
        if not path.exists():
            with _placed(path) as temporary:
                gguf_files.convert(self.gguf, precision, temporary)
        return path

    def _made(self, kind: PeerKind, precision: str, threads: int, python: str | None) -> Path:
        folder = self.folder / f"{kind.name}-{precision}"
        if not folder.exists():
            command = command_of(kind.worker, python or sys.executable)
            with (
                _placed(folder) as temporary,
                Worker(command, environment_of(threads, own=python is None)) as worker,
            ):
                temporary.mkdir()
                asked = {"precision": precision, "checkpoint": str(self.checkpoint), "out": str(temporary)}
                try:
                    worker.ask("convert", CONVERSION, **asked)
                except PeerError as error:
                    if "ModuleNotFoundError" in error.cause or "ImportError" in error.cause:
                        raise MissingError(
                            f"its converter lacks something ({error.cause}); {kind.converter}"
                        ) from error
                    raise
        return folder

    def _engine(self, precision: str) -> Path:
        folder = self.folder / f"ours-{precision}"
        if not folder.exists():
            with _placed(folder) as temporary:
                command = [sys.executable, "-m", "ht_export.cli", self.source, "--precision", EXPORTS[precision]]
                command += ["--out", str(temporary / "engine.onnx")]
                command += ["--transfer", str(self.transfer)] if self.transfer else []
                done = subprocess.run(
                    command,
                    env=environment_of(1, own=True),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    check=False,
                )
                if done.returncode:
                    lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no word why"]
                    raise PeerError(f"cannot export the engine: {one_line(lines[-1])}")
        return folder / "engine.onnx"


def prepare(source: str, work: Path, gguf: Path | None, transfer: Path | None) -> Forms:
    """Return the forms of a model, with the checkpoint of it. Raises `InputError` for a model that cannot be loaded."""
    from ht_export.model.locate import locate

    location = locate(source)
    own = Path(location.path)
    if location.gguf_file:
        files = [own / location.gguf_file]
    else:
        files = sorted(own.glob("*.safetensors")) if own.is_dir() else []
    stamp = repr((source if not files else "", [(file.name, file.stat().st_size) for file in files]))
    stamp += repr([file.stat().st_mtime_ns for file in files])
    folder = work / f"{Path(source).stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    description = folder / DESCRIPTION
    if not description.exists():
        about = _write_checkpoint(source, folder / "checkpoint")
        write_json(description, asdict(about))
    if gguf is not None and not gguf.is_file():
        raise InputError(f"--gguf: no file at {gguf}; give a GGUF file of the same weights")
    return Forms(
        source, folder, DESCRIBED.read(description), gguf or (files[0] if location.gguf_file else None), transfer
    )


def _write_checkpoint(source: str, folder: Path) -> Described:
    """Write the model in float32 as a folder of Hugging Face's; what is quantised has its values, and no more."""
    from safetensors.torch import save_file

    from ht_export.model.checkpoint import load_base_model

    base = load_base_model(source)
    shutil.rmtree(folder, ignore_errors=True)
    with _placed(folder) as temporary:
        temporary.mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in base.model.named_parameters()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        config: dict[str, Any] = base.model.config.to_dict()
        config.pop("quantization_config", None)
        write_json(
            temporary / "config.json",
            {**config, "dtype": "float32", "architectures": [type(base.model).__name__]},
        )
        base.model.generation_config.save_pretrained(temporary)
        base.tokenizer.save_pretrained(temporary)
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    return Described(base.name, base.weights_sha256, base.stop_tokens(), base.max_context, vocabulary)


def bytes_of(path: Path) -> int:
    """Return the bytes of a model's files: of a file, or of all in a folder; of an engine those beside it."""
    if path.suffix == ".onnx":
        return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*") if file.is_file())
    return (
        path.stat().st_size
        if path.is_file()
        else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    )


@contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """Yield a place beside `path` for a file or folder; put it there when the block succeeds, else remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        temporary.parent.mkdir(exist_ok=True)
        if path.name.startswith("ours-"):
            temporary.mkdir()
        yield temporary
        temporary.replace(path)
