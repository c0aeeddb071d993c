"""An engine from a checkpoint: load, trace, write, check, and only then put in place."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ht_export.bundle import check_tokenizer, special_tokens, write_correction, write_tokenizer, write_tokens_of_drafts
from ht_export.graph.domains import OPSET
from ht_export.graph.lower_cpu import can_be_lowered, lower_for_cpu
from ht_export.graph.trace import build_graph
from ht_export.graph.widen import in_float32
from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.dims import graph_dims
from ht_export.model.float32 import computing_in_float32
from ht_export.model.reference import HiddenTransferModel
from ht_export.model.shipped import UNTRAINED as UNTRAINED
from ht_export.model.shipped import Untrained, transfer_layers
from ht_export.preflight import check_memory, check_space, weight_bytes
from ht_export.progress import Stage
from ht_export.prompts import chat_template, encode_chat
from ht_export.quantize.gptq import second_moments
from ht_export.quantize.prepare import Prepared, prepare
from ht_export.quantize.sample_texts import TEXTS
from ht_export.quantize.weights import quantise
from ht_export.scopes import collected
from ht_export.settings import CALIBRATION_TOKENS, Checked, check_settings
from ht_export.settings import ExportSettings as ExportSettings
from ht_export.staging import put_in_place, staging_folder
from ht_export.tensorrt.planner import DEFAULT_CHUNK, PlanSettings, PreparedPlan
from ht_export.verify.passes import Expected, LoweredEngine, ReferenceEngine, check, difference, record
from ht_export.versions import PROJECT, version_of
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import EngineFile, FileRecord, PlanFile
from runtime.bundle.placing import CPU_SUFFIX
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.program import Advance
from runtime.tree import TreeSizes


@dataclass(frozen=True)
class Loaded:
    """The model in memory, and the engine's sizes; `plan` is what a plan will be built with, None for ONNX Runtime."""

    base: BaseModel
    model: HiddenTransferModel
    about_transfer: dict[str, Any]
    dims: GraphDims
    tree: TreeSizes
    chunk: int
    max_context: int
    plan: PreparedPlan | None


@dataclass(frozen=True)
class Traced:
    """The graph on the disk with its weights beside it, and all that is still needed of the model: what it computed,
    the `texts` to calibrate on, as tokens, and what it says of the engine, to be completed.
    """

    graph: Path
    weights: Path
    dims: GraphDims
    expected: list[Expected]
    texts: list[list[int]]
    plan: PreparedPlan | None
    describe: partial[EngineFile]


@dataclass(frozen=True)
class Verified:
    """Differences of graphs from the reference, as `engine.json` has them; empty where there was nothing to compare."""

    parity: dict[str, Any]


@dataclass(frozen=True)
class Lowered:
    """The graph lowered for the CPU, None where there is none."""

    graph: Path | None = None
    parity: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantised:
    """The method that weights were quantised by; empty if they were not."""

    parity: dict[str, Any] = field(default_factory=dict)


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
    checked = check_settings(source, transfer_file, out, settings, plan_settings)
    with staging_folder(out) as folder:
        traced = collected(trace(checked, folder, stage))
        verified = verify(traced, stage)
        lowered = lower(checked, traced, stage)
        quantised = collected(quantise_weights(checked, traced, lowered, stage))
        rounded = verify_quantised(checked, traced, lowered, stage)
        plan = build_plan(checked, traced, folder, stage)
        parity = verified.parity | lowered.parity | quantised.parity | rounded.parity
        return install(checked, traced, lowered, plan, parity, folder, stage)


def trace(checked: Checked, folder: Path, stage: Stage) -> Traced:
    """Do all that needs the model, whose memory is free afterwards: load it, write and check its graph, and record what
    the PyTorch reference computes.
    """
    loaded = load(checked, stage)
    graph, weights = write_graph(checked, loaded.model, folder, stage)
    with stage("checking the graph"):
        onnx.checker.check_model(str(graph), full_check=True)
    with stage("running the PyTorch reference"), computing_in_float32(loaded.model, checked.dtype):
        expected = record(ReferenceEngine(loaded.model))
    base, stem = loaded.base, checked.out.stem
    correction = write_correction(base.model, loaded.model.transfer, folder, stem)
    tokenizer, template = write_tokenizer(base, folder, stem)
    limit = min(CALIBRATION_TOKENS, loaded.max_context)
    describe = partial(
        EngineFile,
        dims=loaded.dims,
        precision=loaded.dims.dtype if checked.storage is None else checked.precision,
        tree=loaded.tree,
        prompt_chunk=loaded.chunk,
        max_context=loaded.max_context,
        stop_tokens=tuple(base.stop_tokens()),
        special_tokens=special_tokens(base),
        tokenizer=tokenizer,
        chat_template=template,
        correction=correction,
        draft_tokens=write_tokens_of_drafts(loaded.model.transfer, folder, stem),
        base_model=base.identity(),
        transfer=loaded.about_transfer,
        versions=_versions(),
    )
    return Traced(
        graph=graph,
        weights=weights,
        dims=loaded.dims,
        expected=expected,
        texts=[encode_chat(base.tokenizer, [prompt])[:limit] for prompt in checked.prompts or TEXTS],
        plan=loaded.plan,
        describe=describe,
    )


def load(checked: Checked, stage: Stage) -> Loaded:
    """Load the base model and its transfer layers. Raises `InputError` when the machine is too small for the export, or
    the engine cannot be.
    """
    settings, planner = checked.settings, checked.planner
    with stage("loading the base model"):
        base = load_base_model(checked.source, None, settings.max_context, settings.adapters)
        check_tokenizer(base)
        # No engine of a template that cannot be compiled would load.
        chat_template(base.tokenizer)
        transfer, about_transfer = transfer_layers(checked.transfer, base)
    tree = settings.tree(transfer.num_steps, plan=planner is not None)
    weights_take = weight_bytes(
        base.model, checked.dtype, checked.storage, as_stored=checked.as_stored, draft_size=transfer.draft_size
    )
    check_space(weights_take, checked.out)
    check_memory(base.model, weights_take.quantised if checked.as_stored else 0)
    dims = graph_dims(base.model.config, transfer, str(checked.dtype).removeprefix("torch."))
    context = base.max_context
    chunk = DEFAULT_CHUNK if settings.chunk is None else settings.chunk
    plan = None
    if planner:
        asked = settings.chunk, settings.max_context
        plan = planner.prepare(dims, tree, asked, context, weights_take.engine, checked.out.parent)
        context, chunk = plan.limits.max_context, plan.limits.chunk
    model = HiddenTransferModel(base.model, transfer).eval()
    return Loaded(base, model, about_transfer, dims, tree, chunk, context, plan)


def write_graph(checked: Checked, model: HiddenTransferModel, folder: Path, stage: Stage) -> tuple[Path, Path]:
    """Write the graph to `folder`; return its path and that of its weights."""
    path = folder / f"{checked.out.stem}.onnx"
    weights = folder / f"{path.name}.data"
    with stage("tracing the graph"):
        graph = build_graph(model, checked.dtype, as_stored=checked.as_stored)
    with stage("writing the graph and its weights"):
        ir.save(graph, path, external_data=weights.name)
    return path, weights


def verify(traced: Traced, stage: Stage) -> Verified:
    """Compare the graph with the reference, both computed in float32. Raises `InputError` when they differ."""
    with stage("comparing the graph with the reference"), in_float32(traced.graph, traced.dims) as (graph, computed):
        largest = check(OnnxRuntimeEngine(graph, computed, small=True), traced.expected)
    return Verified({"reference": "PyTorch", "largest_relative_difference": largest})


def lower(checked: Checked, traced: Traced, stage: Stage) -> Lowered:
    """Write the graph lowered for the CPU where there is one, and compare it with the reference."""
    if checked.planner or not can_be_lowered(traced.dims):
        return Lowered()
    with stage("lowering the graph for the CPU"):
        path = _write_lowered(traced)
        engine = LoweredEngine(path, traced.dims, small=True)
        return Lowered(path, {"of_the_cpu_graph": check(engine, traced.expected)})


def quantise_weights(checked: Checked, traced: Traced, lowered: Lowered, stage: Stage) -> Quantised:
    """Quantise the weights of the graph, and of the lowered one, in their place where that is asked for, calibrated on
    texts if there are any.
    """
    if checked.storage is None:
        return Quantised()
    whole = traced.graph.rename(traced.graph.with_name(f"{traced.graph.stem}.whole.onnx"))
    texts, prepared = traced.texts if checked.prompts else [], None
    if checked.storage.rounds_rows:
        with stage("rotating and smoothing the weights") as tell:
            prepared = _prepare(traced, whole, lambda done, total: tell(f"text {done} of {total}"))
    with stage("quantising the weights") as tell:
        if texts:
            with in_float32(whole, traced.dims) as (graph, computed):
                moments = second_moments(graph, computed, texts, lambda done, total: tell(f"text {done} of {total}"))
                quantise(whole, traced.graph, checked.storage, moments)
        else:
            quantise(whole, traced.graph, checked.storage)
    whole.unlink()
    if lowered.graph:
        _write_lowered(traced)
    about: dict[str, Any] = {"method": "GPTQ" if texts else "round to nearest", "texts": len(texts)}
    if prepared is not None:
        about |= {"rotated": prepared.rotated, "smoothed_products": prepared.smoothed}
    return Quantised({"quantisation": about})


def _prepare(traced: Traced, whole: Path, advance: Advance) -> Prepared:
    """Put a graph that is prepared for rounded rows in the place of the one at `whole`, and its weights in that of the
    traced ones.
    """
    with tempfile.TemporaryDirectory(prefix=f"{whole.name}.", dir=whole.parent) as folder:
        made = Path(folder) / traced.graph.name
        found = prepare(whole, made, traced.dims, traced.texts, advance)
        made.replace(whole)
        made.with_name(f"{made.name}.data").replace(traced.weights)
    return found


def verify_quantised(checked: Checked, traced: Traced, lowered: Lowered, stage: Stage) -> Verified:
    """Check the graph with quantised weights, and measure how far they take it, and the one for the CPU, from the
    reference. Raises `InputError` when that is no longer what they compute.
    """
    if checked.storage is None:
        return Verified({})
    with stage("checking the quantised weights"):
        onnx.checker.check_model(str(traced.graph))
        parity = {"of_quantised_weights": _difference_of_weights(traced)}
        if lowered.graph:
            engine = LoweredEngine(lowered.graph, traced.dims)
            parity["of_quantised_weights_on_the_cpu"] = difference(engine, traced.expected)
    return Verified(parity)


def build_plan(checked: Checked, traced: Traced, folder: Path, stage: Stage) -> PlanFile | None:
    """Build the plan where one is asked for, in the place of the graph and its weights."""
    if traced.plan is None:
        return None
    with stage("compiling kernels") as tell:
        kernels = traced.plan.compile(traced.graph, lambda done, total: tell(f"{done} of {total}"))
    with stage("building the plan") as tell:
        built = traced.plan.build(traced.graph, kernels, folder / checked.out.name, tell)
    traced.graph.unlink()
    traced.weights.unlink()
    return built


def install(
    checked: Checked,
    traced: Traced,
    lowered: Lowered,
    plan: PlanFile | None,
    parity: dict[str, Any],
    folder: Path,
    stage: Stage,
) -> EngineFile:
    """Put the finished files in place; return what `engine.json` says."""
    description = traced.describe(
        graph=FileRecord.of(folder / checked.out.name),
        cpu_graph=FileRecord.of(lowered.graph) if lowered.graph else None,
        weights=None if plan else FileRecord.of(traced.weights),
        parity=parity,
        plan=plan,
    )
    with stage("putting the engine in place"):
        put_in_place(folder, checked.out, description)
    return description


def _write_lowered(traced: Traced) -> Path:
    """Write the graph lowered for the CPU beside the portable one, with whose weights it goes; return its path."""
    lowered = traced.graph.with_name(f"{traced.graph.stem}{CPU_SUFFIX}")
    model = ir.load(traced.graph)
    lower_for_cpu(model, traced.dims)
    ir.save(model, lowered)
    return lowered


def _difference_of_weights(traced: Traced) -> float:
    """Return the largest relative difference from the reference that quantised weights alone make: what is `small`
    multiplies them in float32, one matrix at a time.
    """
    with in_float32(traced.graph, traced.dims) as (graph, computed):
        return difference(OnnxRuntimeEngine(graph, computed, small=True), traced.expected)


def _versions() -> dict[str, str]:
    packages = (PROJECT, "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    return {**{name: version_of(name) for name in packages}, "opset": str(OPSET)}
