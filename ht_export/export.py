"""An engine from a checkpoint: load, trace, write, check, and only then put in place."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from ht_export.bundle import CPU_SUFFIX, check_out, put_in_place, staging_folder
from ht_export.graph.domains import OPSET
from ht_export.graph.lower_cpu import can_be_lowered, lower_for_cpu
from ht_export.graph.trace import build_graph, graph_dims
from ht_export.graph.widen import in_float32
from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.correction import correction_tables
from ht_export.model.float32 import computing_in_float32
from ht_export.model.reference import HiddenTransferModel
from ht_export.model.shipped import UNTRAINED as UNTRAINED
from ht_export.model.shipped import Untrained, shipped_transfer, transfer_layers
from ht_export.preflight import check_memory, check_space, weight_bytes
from ht_export.progress import Stage
from ht_export.prompts import encode_chat, evenly, read_conversations
from ht_export.quantize.formats import Storage
from ht_export.quantize.gptq import second_moments
from ht_export.quantize.precision import storage_of
from ht_export.quantize.weights import quantise
from ht_export.tensorrt.planner import DEFAULT_CHUNK, Planner, PlanSettings
from ht_export.verify.passes import Expected, LoweredEngine, ReferenceEngine, check, difference, record
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import EngineFile, FileRecord, PlanFile
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import InputError
from runtime.tree import TreeSizes

DEFAULT_TREE_ROWS = 4
PLAN_TREE_ROWS = 16


# Texts that quantisation is calibrated on, and tokens of each.
CALIBRATION_TEXTS = 64
CALIBRATION_TOKENS = 256


@dataclass(frozen=True)
class ExportSettings:
    """What an export may choose: the engine's default row counts, the prompt tokens of a pass, its precision ("fp32",
    "fp16", "bf16", "int8" or "int4", or for plans "fp8"), the tokens of prompt and answer together, and a file of
    prompts to calibrate quantisation on.

    The defaults of ONNX engines had the best measured cost and simulated acceptance of some forty for SmolLM2-135M on
    two CPU cores, where rows are dear; on a GPU they cost little.
    """

    tree_rows: int | None = None
    pseudo_rows: tuple[int, ...] | None = None
    chunk: int | None = None
    precision: str | None = None
    max_context: int | None = None
    calibration: Path | None = None

    def tree(self, num_steps: int, *, plan: bool = False) -> TreeSizes:
        """Return the row counts for K draft steps. Raises `InputError` when they do not fit."""
        default = PLAN_TREE_ROWS if plan else DEFAULT_TREE_ROWS
        tree_rows = default if self.tree_rows is None else self.tree_rows
        # On a CPU fewer for later steps, whose drafts are right less often.
        later = tree_rows if plan else (tree_rows + 1) // 2
        usual = (tree_rows, *(later,) * num_steps)[:num_steps]
        pseudo_rows = usual if self.pseudo_rows is None else self.pseudo_rows
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


def export(
    source: str,
    transfer_file: Path | Untrained | None,
    out: Path,
    settings: ExportSettings,
    stage: Stage,
    plan_settings: PlanSettings | None = None,
) -> EngineFile:
    """Write the engine of `source` with its transfer layers to `out` and the files beside it.

    `out` ends in .onnx, or in .plan for a TensorRT plan, to which `plan_settings` apply. `transfer_file` None takes
    the transfer layers shipped for a known model, `UNTRAINED` makes some that begin as the identity. `stage` is
    entered around each stage with its description. Nothing is put in place unless the graph passes `onnx.checker` with
    shape inference and agrees with the PyTorch reference. Raises `InputError`.
    """
    check_out(out)
    if settings.chunk is not None and settings.chunk < 1:
        raise InputError(f"--chunk must be at least 1, not {settings.chunk}")
    is_plan = out.suffix == ".plan"
    precision = settings.precision or ("fp16" if is_plan else "fp32")
    dtype, storage = storage_of(precision, is_plan)
    planner = Planner(plan_settings or PlanSettings(), precision) if is_plan else None
    prompts = _calibration_prompts(settings.calibration, precision, storage)
    transfer_path = shipped_transfer(source) if transfer_file is None else transfer_file
    with stage("loading the base model"):
        base = load_base_model(source, None, settings.max_context)
        transfer, about_transfer = transfer_layers(transfer_path, base)
    sizes = settings.tree(transfer.num_steps, plan=is_plan)
    # What is quantised is rounded from what the checkpoint has.
    as_stored = storage is not None and not is_plan
    weights_take = weight_bytes(base.model, dtype, storage, as_stored=as_stored)
    check_space(weights_take, out)
    check_memory(base.model, weights_take.quantised if as_stored else 0)
    model = HiddenTransferModel(base.model, transfer).eval()
    dims = graph_dims(base.model.config, transfer, str(dtype).removeprefix("torch."))
    context = base.max_context
    chunk = DEFAULT_CHUNK if settings.chunk is None else settings.chunk
    if planner:
        asked = settings.chunk, settings.max_context
        limits = planner.prepare(dims, sizes, asked, context, weights_take.engine, out.parent)
        context, chunk = limits.max_context, limits.chunk
    with stage("tracing the graph"):
        graph = build_graph(model, dtype, as_stored=as_stored)
    with staging_folder(out) as folder:
        staged = folder / f"{out.stem}.onnx"
        weights = folder / f"{staged.name}.data"
        with stage("writing the graph and its weights"):
            ir.save(graph, staged, external_data=weights.name)
            del graph
        with stage("checking the graph"):
            onnx.checker.check_model(str(staged), full_check=True)
        with stage("running the PyTorch reference"), computing_in_float32(model, dtype):
            expected = record(ReferenceEngine(model))
        correction = _write_correction(model, folder, out.stem)
        tokenizer, template = _write_tokenizer(base, folder, out.stem)
        texts = [encode_chat(base.tokenizer, [prompt])[: min(CALIBRATION_TOKENS, context)] for prompt in prompts]
        stop_tokens, special_tokens, identity = tuple(base.stop_tokens()), _special_tokens(base), base.identity()
        # What follows needs the memory, and the tracer holds on to parameters.
        for parameter in model.parameters():
            parameter.data = torch.empty(0)
        del model, base, transfer
        gc.collect()
        with stage("comparing the graph with the reference"):
            parity: dict[str, Any] = {"reference": "PyTorch"}
            parity["largest_relative_difference"] = _compare(staged, dims, expected)
        lowered: Path | None = None
        if not planner and can_be_lowered(dims):
            with stage("lowering the graph for the CPU"):
                lowered = _lower(staged, dims)
                parity["of_the_cpu_graph"] = check(LoweredEngine(lowered, dims, small=True), expected)
        if storage is not None:
            with stage("quantising the weights") as tell:
                _quantise(staged, storage, dims, texts, tell)
                parity["quantisation"] = {"method": "GPTQ" if texts else "round to nearest", "texts": len(texts)}
            with stage("checking the quantised weights"):
                onnx.checker.check_model(str(staged))
                with in_float32(staged, dims) as (widened, computed):
                    # Weights alone: what is `small` multiplies them in float32, one matrix at a time.
                    rounded = OnnxRuntimeEngine(widened, computed, small=True)
                    parity["of_quantised_weights"] = difference(rounded, expected)
                    del rounded
                if lowered:
                    parity["of_quantised_weights_on_the_cpu"] = difference(
                        LoweredEngine(_lower(staged, dims), dims), expected
                    )
        plan: PlanFile | None = None
        if planner:
            with stage("building the plan") as tell:
                plan = planner.build(staged, folder / out.name, tell)
            staged.unlink()
            weights.unlink()
        description = EngineFile(
            dims=dims,
            precision=dims.dtype if storage is None else precision,
            tree=sizes,
            prompt_chunk=chunk,
            max_context=context,
            stop_tokens=stop_tokens,
            special_tokens=special_tokens,
            graph=FileRecord.of(folder / out.name),
            cpu_graph=FileRecord.of(lowered) if lowered else None,
            weights=None if plan else FileRecord.of(weights),
            tokenizer=tokenizer,
            chat_template=template,
            correction=correction,
            base_model=identity,
            transfer=about_transfer,
            versions=_versions(),
            parity=parity,
            plan=plan,
        )
        with stage("putting the engine in place"):
            put_in_place(folder, out, description)
    return description


def _compare(graph: Path, dims: GraphDims, expected: Sequence[Expected]) -> float:
    """Return the largest relative difference between the graph and the reference, both computed in float32."""
    with in_float32(graph, dims) as (widened, computed):
        return check(OnnxRuntimeEngine(widened, computed, small=True), expected)


def _quantise(
    staged: Path, storage: Storage, dims: GraphDims, texts: Sequence[Sequence[int]], tell: Callable[[str], None]
) -> None:
    """Quantise the weights of the graph at `staged`, in its place, calibrated on `texts` if there are any."""
    whole = staged.rename(staged.with_name(f"{staged.stem}.whole.onnx"))
    if texts:
        with in_float32(whole, dims) as (graph, computed):
            moments = second_moments(graph, computed, texts, lambda done, total: tell(f"text {done} of {total}"))
            quantise(whole, staged, storage, moments)
    else:
        quantise(whole, staged, storage)
    whole.unlink()
    # Graphs are full of cycles, and this one maps files that are gone.
    gc.collect()


def _calibration_prompts(path: Path | None, precision: str, storage: Storage | None) -> list[str]:
    """Return prompts to calibrate on, evenly from the file. Raises `InputError`."""
    if path is None:
        return []
    if storage is None or storage.grid is None:
        raise InputError(
            f"--calibrate: {'nothing is quantised' if storage is None else 'weights are rounded to the nearest'} in "
            f"{precision}; use --precision int4, or leave it out"
        )
    return [one.turns[0] for one in evenly(read_conversations(path), CALIBRATION_TEXTS)]


def _lower(staged: Path, dims: GraphDims) -> Path:
    """Write the graph lowered for the CPU beside the portable one, with whose weights it goes; return its path."""
    lowered = staged.with_name(f"{staged.stem}{CPU_SUFFIX}")
    model = ir.load(staged)
    lower_for_cpu(model, dims)
    ir.save(model, lowered)
    return lowered


def _write_tokenizer(base: BaseModel, folder: Path, stem: str) -> tuple[FileRecord, FileRecord | None]:
    backend = getattr(base.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{base.source} has no fast tokenizer (tokenizer.json); convert its tokenizer first")
    path = folder / f"{stem}.tokenizer.json"
    path.write_text(backend.to_str(pretty=True), encoding="utf-8")
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
