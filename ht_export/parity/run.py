"""One run of `ht-parity`: load, trace every stage, answer prompts."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ht_export.foreign import foreign_code
from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.reference import HiddenTransferModel
from ht_export.model.shipped import UNTRAINED, Untrained, shipped_transfer, transfer_layers
from ht_export.parity.report import Report
from ht_export.parity.stages import TOLERANCES, Comparison, compare_passes, compare_traces
from ht_export.parity.text import TextSummary, compare_text
from ht_export.progress import Stage
from ht_export.prompts import evenly, read_conversations
from ht_export.quantize.precision import PRECISIONS
from ht_export.verify.passes import Computed, Expected, record
from ht_export.verify.traces import GraphTracer, ReferenceTracer, Trace, transformers_trace
from ht_export.versions import PROJECT, version_of
from runtime.bundle.engine_file import EngineFile, read_engine_file
from runtime.checks import MOST_THREADS, whole
from runtime.engines.protocol import Batch
from runtime.errors import InputError
from runtime.generator import Generator

OWN_PROMPTS = (
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that returns the median of a list, with a docstring.",
    "List five things to see in Rome, with one sentence about each.",
)
DEFAULT_COUNT = 10
# Limits of the text that stages are compared on.
MOST_TOKENS = 96
LEAST_TOKENS = 24
# Weights beyond which ONNX's reference evaluator, which is written for clearness, takes minutes.
EVALUATED_WEIGHTS = 4 << 30


@dataclass(frozen=True)
class ParitySettings:
    """The comparison that is asked for. `transfer` None takes what the engine was made with, where that is known;
    `prompts` None takes three of ours; without `max_new_tokens` none is answered. `adapters` are those of the engine.
    """

    model: str
    engine: Path
    transfer: Path | None = None
    prompts: Path | None = None
    count: int | None = None
    max_new_tokens: int = 64
    evaluator: bool = True
    threads: int | None = None
    adapters: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.count is not None and self.prompts is None:
            raise InputError("--count is of a file of prompts; give one with --prompts, or leave it out")
        whole("--count", DEFAULT_COUNT if self.count is None else self.count, 1)
        whole("--max-new-tokens", self.max_new_tokens, 0)
        if self.threads is not None:
            whole("--threads", self.threads, 1, MOST_THREADS)


def run(settings: ParitySettings, stage: Stage) -> Report:
    """Compare all stages and the text. Raises `InputError` for what does not belong together."""
    about = read_engine_file(settings.engine)
    prompts = _prompts(settings)
    with stage("loading the base model"):
        base = load_base_model(settings.model, PRECISIONS[about.computed_in], about.max_context, settings.adapters)
        transfer, described = transfer_layers(_transfer_of(settings, about), base)
        _check_made_from(settings, about, base, described)
        # In float32 the rounded weights are those of the engine.
        for parameter in (*base.model.parameters(), *transfer.parameters()):
            parameter.data = parameter.data.to(torch.float32)
    with stage("loading the engine"):
        generator = _generator(settings, about)
    first = prompts[0][1]
    ids = _tokens(base, about, first)
    with stage("running transformers"):
        theirs = transformers_trace(base.model, ids)
    reference = ReferenceTracer(HiddenTransferModel(base.model, transfer).eval())
    with stage("running the PyTorch reference"):
        passes = record(reference.engine, tokens=ids)
        expected = [(one, reference.run(one.rows, one.cache)) for one in passes]
    stages = [Comparison("PyTorch reference", "transformers", TOLERANCES["float32"], list(_on_text(expected, theirs)))]
    for name, compare in _engine_stages(settings, about, generator, expected):
        with stage(f"running {name}"):
            stages.append(compare())
    text = None
    if settings.max_new_tokens and not isinstance(generator, str):
        text = TextSummary([])
        for number, (name, prompt) in enumerate(prompts, start=1):
            with stage(f"answering prompt {number} of {len(prompts)}"):
                found = compare_text(
                    generator, base.model, name, prompt, settings.max_new_tokens, TOLERANCES[about.precision]
                )
                text.prompts.append(found)
    return Report(_conditions(settings, about, base, len(prompts)), stages, text)


def _engine_stages(
    settings: ParitySettings, about: EngineFile, generator: Generator | str, expected: list[tuple[Expected, Trace]]
) -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Yield the stages of an engine, each with what compares it with the PyTorch reference."""
    against, tolerance = "PyTorch reference", TOLERANCES[about.precision]
    folder = settings.engine.parent

    def skipped(name: str, reason: str) -> tuple[str, Callable[[], Comparison]]:
        return name, lambda: Comparison(name, against, tolerance, skipped=reason)

    def graph(name: str, path: Path, *, evaluator: bool = False) -> tuple[str, Callable[[], Comparison]]:
        def compared() -> Comparison:
            with foreign_code(f"cannot run {path}", "export the engine again"):
                tracer = GraphTracer(path, about.dims, reference=evaluator)
                return compare_passes(name, against, tolerance, tracer, expected)

        return name, compared

    if about.plan is not None:
        name = f"TensorRT ({about.plan.product} {about.plan.version})"
        if isinstance(generator, str):
            yield skipped(name, generator)
        else:
            yield name, lambda: Comparison(name, against, tolerance, list(_in_its_own_cache(generator, expected)))
        return
    name = "ONNX reference evaluator"
    if not settings.evaluator:
        yield skipped(name, "--no-evaluator was given")
    elif about.precision in ("int8", "int4"):
        yield skipped(name, "it does not know the operator of quantised weights")
    elif about.weights and about.weights.bytes > EVALUATED_WEIGHTS:
        yield skipped(name, "the model is too large for it")
    else:
        yield graph(name, settings.engine, evaluator=True)
    if about.dims.dtype == "bfloat16":
        yield skipped("ONNX Runtime", "on a CPU it does not compute in bfloat16")
        return
    yield graph("ONNX Runtime", settings.engine)
    if about.cpu_graph is not None:
        yield graph("ONNX Runtime, lowered for the CPU", folder / about.cpu_graph.name)


def _on_text(expected: Sequence[tuple[Expected, Trace]], theirs: Trace) -> Iterator[Any]:
    """Yield how the passes over the text differ from what `transformers` computes for all of it at once."""
    for one, trace in expected:
        start, count = one.cache.length, len(one.rows.input_ids)
        if start + count > len(theirs.outputs.logits):
            return
        part = slice(start, start + count)
        outputs = Computed(
            theirs.outputs.logits[part],
            theirs.outputs.logits[:0],
            [key[:, :, part] for key in theirs.outputs.key_new],
            [value[:, :, part] for value in theirs.outputs.value_new],
        )
        own = trace.outputs
        keys, values = ([array[:, :, :count] for array in kind] for kind in (own.key_new, own.value_new))
        yield from compare_traces(one.case, Trace(Computed(own.logits, own.logits[:0], keys, values)), Trace(outputs))


def _in_its_own_cache(generator: Generator, expected: Sequence[tuple[Expected, Trace]]) -> Iterator[Any]:
    """Yield how the outputs of an engine whose cache is its own differ."""
    engine = generator.engine
    slot = engine.new_slot()
    for one, trace in expected:
        result = engine.run(Batch.of([one.rows], [slot]))
        found = result.outputs(0)
        logits, drafts = (
            np.array([rows[row] for row in range(len(rows))]) for rows in (found.logits, found.draft_logits)
        )
        yield from compare_traces(one.case, Trace(Computed(logits, drafts)), trace)
        engine.commit(result, [one.accepted])


def _generator(settings: ParitySettings, about: EngineFile) -> Generator | str:
    """Return the engine, or why it cannot run here."""
    try:
        return Generator(settings.engine, threads=settings.threads, adapt=False, prefix_cache_bytes=0)
    except InputError as error:
        if about.plan is None and about.dims.dtype != "bfloat16":
            raise
        return str(error)


def _tokens(base: BaseModel, about: EngineFile, prompt: str) -> list[int]:
    """Return the text that stages are compared on."""
    ids = base.tokenizer(prompt)["input_ids"]
    # A short prompt is repeated.
    repeats = -(-LEAST_TOKENS // max(1, len(ids)))
    return (list(ids) * repeats)[: min(MOST_TOKENS, about.max_context // 2)]


def _prompts(settings: ParitySettings) -> list[tuple[str, str]]:
    if settings.prompts is None:
        return [(prompt[:30], prompt) for prompt in OWN_PROMPTS]
    found = evenly(read_conversations(settings.prompts), settings.count or DEFAULT_COUNT)
    return [(one.id, one.turns[0]) for one in found]


def _transfer_of(settings: ParitySettings, about: EngineFile) -> Path | Untrained:
    if settings.transfer is not None:
        return settings.transfer
    return UNTRAINED if about.transfer["recipe"].get("steps") == 0 else shipped_transfer(settings.model)


def _check_made_from(settings: ParitySettings, about: EngineFile, base: BaseModel, described: dict[str, Any]) -> None:
    """Raise `InputError` unless the engine was made from this model and these transfer layers."""
    made_from = about.base_model["weights_sha256"]
    if made_from != base.weights_sha256:
        raise InputError(
            f"{settings.engine} was made from {about.base_model['name']} ({made_from[:12]}), and {settings.model} has "
            f"other weights ({base.weights_sha256[:12]}); give the engine's own model, and with --adapter the adapters "
            "that were merged into it"
        )
    if about.transfer["sha256"] != described["sha256"]:
        raise InputError(f"{settings.engine} was made with other transfer layers; give them with --transfer")


def _conditions(settings: ParitySettings, about: EngineFile, base: BaseModel, prompts: int) -> dict[str, Any]:
    answered = settings.max_new_tokens > 0
    return {
        "model": base.name,
        "engine": settings.engine.name,
        "precision": about.precision,
        "prompts": prompts if answered else None,
        "new_tokens": settings.max_new_tokens if answered else None,
        "machine": platform.machine(),
        **{name: version_of(name) for name in ("torch", "transformers", "onnx", "onnxruntime")},
        PROJECT: version_of(PROJECT),
    }
