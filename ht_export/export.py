"""An engine from a checkpoint: load, trace, write, check, and only then put in place."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import onnx
import onnx_ir as ir

from ht_export.checkpoint import KNOWN_MODELS, BaseModel, load_base_model
from ht_export.correction import correction_tables
from ht_export.graph import OPSET, build_graph, graph_dims
from ht_export.model import HiddenTransferModel
from ht_export.parity import ReferenceEngine, check
from ht_export.transfer import load_transfer_layers
from runtime.engine_file import EngineFile, FileRecord, engine_file_path
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import InputError
from runtime.files import check_writable, sha256_file, unwritable
from runtime.tree import TreeSizes

PRETRAINED = Path(__file__).parent / "pretrained"

DEFAULT_TREE_ROWS = 4

Stage = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class ExportSettings:
    """What an export may choose: the engine's default row counts, and the prompt tokens of a pass.

    The defaults had the best measured cost and simulated acceptance of some forty for SmolLM2-135M on two CPU cores.
    """

    tree_rows: int | None = None
    pseudo_rows: tuple[int, ...] | None = None
    prompt_chunk: int = 256

    def tree(self, num_steps: int) -> TreeSizes:
        """Return the row counts for K draft steps. Raises `InputError` when they do not fit."""
        tree_rows = DEFAULT_TREE_ROWS if self.tree_rows is None else self.tree_rows
        # Fewer for later steps, whose drafts are right less often.
        fewer = (tree_rows, *((tree_rows + 1) // 2,) * num_steps)[:num_steps]
        pseudo_rows = fewer if self.pseudo_rows is None else self.pseudo_rows
        if len(pseudo_rows) != num_steps:
            raise InputError(
                f"--pseudo-rows has {len(pseudo_rows)} numbers, and the transfer layers have {num_steps} steps; "
                "give one number for each step"
            )
        if tree_rows < 1 or min(pseudo_rows) < 0 or max(pseudo_rows) > tree_rows:
            raise InputError(
                f"--tree-rows must be at least 1, and every number of --pseudo-rows between 0 and it; "
                f"not {tree_rows} and {','.join(map(str, pseudo_rows))}"
            )
        if any(later and not earlier for earlier, later in pairwise(pseudo_rows)):
            raise InputError(
                f"--pseudo-rows {','.join(map(str, pseudo_rows))}: a draft step needs the steps before "
                "it; give no rows to a step only if none after it has any"
            )
        return TreeSizes(tree_rows, pseudo_rows)


def export(source: str, transfer_file: Path | None, out: Path, settings: ExportSettings, stage: Stage) -> EngineFile:
    """Write the engine of `source` with its transfer layers to `out` and the files beside it.

    `transfer_file` None takes the transfer layers shipped for a known model. `stage` is entered around each stage
    with its description. Nothing is put in place unless the graph passes `onnx.checker` with shape inference and
    agrees with the PyTorch reference. Raises `InputError`.
    """
    check_out(out)
    if settings.prompt_chunk < 1:
        raise InputError(f"--prompt-chunk must be at least 1, not {settings.prompt_chunk}")
    transfer_path = transfer_file or shipped_transfer(source)
    with stage("loading the base model"):
        base = load_base_model(source)
        transfer, about_transfer = load_transfer_layers(transfer_path, base.identity())
    _check_space(base, out)
    model = HiddenTransferModel(base.model, transfer).eval()
    sizes = settings.tree(transfer.num_steps)
    with stage("tracing the graph"):
        graph = build_graph(model)
    with _staging_folder(out) as folder:
        staged = folder / out.name
        weights = folder / f"{out.name}.data"
        with stage("writing the graph and its weights"):
            ir.save(graph, staged, external_data=weights.name)
        with stage("checking the graph"):
            onnx.checker.check_model(str(staged), full_check=True)
        dims = graph_dims(base.model.config, transfer)
        with stage("comparing with the PyTorch reference"):
            difference = check(OnnxRuntimeEngine(staged, dims), ReferenceEngine(model))
        with stage("putting the engine in place"):
            tokenizer, template = _write_tokenizer(base, folder, out.stem)
            correction = _write_correction(model, folder, out.stem)
            description = EngineFile(
                dims=dims,
                precision="float32",
                tree=sizes,
                prompt_chunk=settings.prompt_chunk,
                max_context=base.model.config.max_position_embeddings,
                stop_tokens=tuple(base.stop_tokens()),
                special_tokens=_special_tokens(base),
                graph=FileRecord.of(staged),
                weights=FileRecord.of(weights),
                tokenizer=tokenizer,
                chat_template=template,
                correction=correction,
                base_model=base.identity(),
                transfer={
                    "sha256": sha256_file(transfer_path),
                    "recipe": about_transfer.recipe,
                    "acceptance": about_transfer.acceptance,
                },
                versions=_versions(),
                parity={"reference": "PyTorch", "largest_relative_difference": difference},
            )
            _put_in_place(folder, out, description)
    return description


def check_out(out: Path) -> None:
    """Raise `InputError` unless `out` names an engine file that this release can write there."""
    if out.suffix == ".plan":
        raise InputError(
            f"{out}: TensorRT plans are not built by this release; they come in a later one. Give --out "
            f"{out.with_suffix('.onnx')} to export for ONNX Runtime now"
        )
    if out.suffix != ".onnx":
        raise InputError(f"{out}: the engine's name must end in .onnx, for example {out.with_suffix('.onnx')}")
    check_writable(out)


def shipped_transfer(source: str) -> Path:
    """Return the transfer layers that the package carries for `source`. Raises `InputError` when there are none."""
    known = KNOWN_MODELS.get(source)
    if known is None:
        raise InputError(
            f"no transfer layers are shipped for {source} (only for: {', '.join(KNOWN_MODELS)}); "
            "train some with ht-train and give them with --transfer"
        )
    return PRETRAINED / known.transfer


def _check_space(base: BaseModel, out: Path) -> None:
    # The head of a model with tied weights is written a second time, transposed.
    needed = int(1.3 * sum(p.numel() * 4 for p in base.model.parameters()))
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise InputError(
            f"{out.parent} has {free / 2**20:.0f} MiB free, and the engine needs about {needed / 2**20:.0f} MiB; "
            "free some space or choose another folder"
        )


@contextlib.contextmanager
def _staging_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` for unfinished files, and remove it whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(folder: Path, out: Path, description: EngineFile) -> None:
    """Move the finished files beside each other; `engine.json` goes first and comes last, so that no reader ever
    finds it beside files of another export.
    """
    engine_file_path(out).unlink(missing_ok=True)
    for path in folder.iterdir():
        path.chmod(0o644)
        path.replace(out.parent / path.name)
    description.write(engine_file_path(out))


def _write_tokenizer(base: BaseModel, folder: Path, stem: str) -> tuple[FileRecord, FileRecord | None]:
    backend = getattr(base.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{base.source} has no fast tokenizer (tokenizer.json); convert its tokenizer first")
    path = folder / f"{stem}.tokenizer.json"
    backend.save(str(path))
    template = base.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        return FileRecord.of(path), None
    template_path = folder / f"{stem}.chat_template.jinja"
    template_path.write_text(template, encoding="utf-8")
    return FileRecord.of(path), FileRecord.of(template_path)


def _write_correction(model: HiddenTransferModel, folder: Path, stem: str) -> FileRecord | None:
    if model.transfer.correction is None:
        return None
    path = folder / f"{stem}.correction.npy"
    correction_tables(model.base, model.transfer.correction).write(path)
    return FileRecord.of(path)


def _special_tokens(base: BaseModel) -> dict[str, str]:
    return {
        name: str(token) for name, token in base.tokenizer.special_tokens_map.items() if not isinstance(token, list)
    }


def _versions() -> dict[str, str]:
    packages = ("hidden-transfer", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    return {**{name: version(name) for name in packages}, "opset": str(OPSET)}
