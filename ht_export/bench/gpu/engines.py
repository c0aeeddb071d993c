"""The engine part of `ht-bench gpu`: is an engine's text right, are its outputs, how long do its passes take.

Needs what runs the engine, and nothing else: no torch.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ht_export.bench.gpu.parts import Sections, attempt, finite, note
from ht_export.bench.gpu.passes import TOLERANCE, compare_outputs, compare_shapes, is_within, pass_times, request_times
from ht_export.example_prompts import HELD_OUT_TOPICS, QUESTIONS
from runtime import GenerationResult, Generator, InputError, TreeSizes
from runtime.bundle.engine_file import EngineFile, Limits, read_engine_file
from runtime.bundle.reading import KERNELS
from runtime.engines.opening import parse_kernels
from runtime.engines.protocol import Batch, Engine
from runtime.rows import lay_out, prompt_rows
from runtime.tree import chain

# Two tokens whose logits are nearer than this, relative to the largest, may change places by rounding alone.
TIE = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 4e-2}
# Time limit of each table of pass times: TensorRT for RTX compiles for every shape that it has not seen.
LATENCY_SECONDS = 60.0


def engine_part(path: Path, reference: Path | None, prompts: int, max_new_tokens: int, seed: int) -> Sections:
    """Yield "about", "decoding", "shapes", "reference" where there is one, "latency" and "requests" of the engine at
    `path`; of a plan "latency_without_graphs" too.
    """
    about = read_engine_file(path)
    limits = pass_limits(about)
    yield "about", describe(about, limits)
    yield from compared(path, reference, limits, example_questions(prompts), max_new_tokens, seed)
    note(f"{path}: timing its passes")
    # The engine above is freed first: the weights of two may not fit.
    gc.collect()
    yield "latency", attempt(lambda: latency(path, about, limits, seed, use_graphs=True))
    gc.collect()
    yield "requests", attempt(lambda: over_requests(path, about, limits, seed))
    if about.plan is not None:
        gc.collect()
        yield "latency_without_graphs", attempt(lambda: latency(path, about, limits, seed, use_graphs=False))


def compared(
    path: Path, reference: Path | None, limits: Limits, questions: Sequence[str], max_new_tokens: int, seed: int
) -> Sections:
    """Yield the sections that compare what an engine computes with what it should."""
    note(f"{path}: loading")
    generator = open_generator(path)
    note(f"{path}: decoding")
    yield "decoding", attempt(lambda: decode(generator, questions, max_new_tokens))
    yield "shapes", attempt(lambda: compare_shapes(engine_of(generator), limits, seed))
    if reference is None:
        return
    note(f"{path}: comparing with {reference}")
    settings = (limits, reference, questions, max_new_tokens, seed)
    yield "reference", attempt(lambda: compare_reference(generator, *settings))


def open_generator(path: Path) -> Generator:
    """Open an engine on the GPU."""
    return Generator(path, device=None if path.suffix == ".plan" else "cuda", prefix_cache_bytes=0)


def engine_of(generator: Generator) -> Engine:
    """Return what runs a generator's passes: private, for no program that embeds the runtime needs logits."""
    return generator.engine


def open_engine(path: Path, about: EngineFile, use_graphs: bool) -> Engine:
    """Open an engine on the GPU that pads no pass to the usual tree, and so tells what other trees would cost."""
    if about.plan is None:
        from runtime.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine

        return OnnxRuntimeCudaEngine(path, about.dims, about.tree, about.prompt_chunk, about.max_context)
    from runtime.engines.tensorrt import TensorRTEngine

    where, content = about.plan.kernels.read(path, KERNELS)
    kernels = parse_kernels(content, where)
    usual = TreeSizes.plain(about.dims.num_steps)
    return TensorRTEngine(path, about.dims, about.plan, about.graph.sha256, usual, kernels, use_graphs=use_graphs)


def pass_limits(about: EngineFile) -> Limits:
    """Return what the engine can run in a pass on the GPU."""
    if about.plan is not None:
        return about.plan.limits
    from runtime.engines.onnxruntime_cuda import MAX_BATCH, MAX_ROWS

    return Limits(MAX_BATCH, about.max_context, max(MAX_ROWS, about.tree.tree_rows), about.prompt_chunk)


def describe(about: EngineFile, limits: Limits) -> dict[str, Any]:
    """Return what the engine is."""
    plan = about.plan
    return {
        "model": about.base_model["name"],
        "dtype": about.dims.dtype,
        "runs_on": f"{plan.product} {plan.version}, {plan.attention} attention" if plan else "onnxruntime, CUDA",
        "tree_rows": about.tree.tree_rows,
        "pseudo_rows": list(about.tree.pseudo_rows),
        "max_context": limits.max_context,
        "max_rows": limits.max_rows,
        "chunk": limits.chunk,
        "sha256": about.graph.sha256,
    }


def example_questions(count: int) -> list[str]:
    """Return questions of every kind in turn, on the held-out topics of `example_prompts`."""
    kinds = zip(itertools.cycle(QUESTIONS.values()), range(count), strict=False)
    return [question.format(HELD_OUT_TOPICS[i % len(HELD_OUT_TOPICS)]) for question, i in kinds]


def decode(generator: Generator, questions: Sequence[str], max_new_tokens: int) -> dict[str, Any]:
    """Answer questions plainly and speculatively: whether the tokens are the same, and how fast they come.

    `speedup` is the mean tokens/s over questions, prompt included, divided by that of plain decoding.
    """
    dtype = generator.about.dims.dtype
    for speculate in (True, False):
        # The first passes of a shape are slower: they compile, or are captured.
        generator.generate(questions[0], max_new_tokens=max_new_tokens, speculate=speculate)
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for question in questions:
        plain, plain_speed = timed(generator, question, max_new_tokens, speculate=False)
        fast, fast_speed = timed(generator, question, max_new_tokens, speculate=True)
        parted = first_difference(generator, question, plain.tokens, fast.tokens)
        if parted and not is_tie(parted["relative_gap"], dtype):
            faults.append(f"speculative text differs from plain text: {parted}, {question!r}")
        rows.append(
            {
                "prompt": question,
                "prompt_tokens": fast.prompt_tokens,
                "tokens": len(fast.tokens),
                "steps": fast.steps,
                "plain": plain_speed,
                "speculative": fast_speed,
                "difference": parted,
            }
        )

    def mean(kind: str, key: str) -> float:
        return statistics.fmean(row[kind][key] for row in rows)

    plain_mean, fast_mean = mean("plain", "tokens_per_second"), mean("speculative", "tokens_per_second")
    decode_means = [mean(kind, "decode_tokens_per_second") for kind in ("plain", "speculative")]
    return {
        "prompts": len(rows),
        "same_text": sum(row["difference"] is None for row in rows),
        "plain_tokens_per_second": plain_mean,
        "tokens_per_second": fast_mean,
        "speedup": fast_mean / plain_mean,
        "decode_speedup": decode_means[1] / decode_means[0] if decode_means[0] else None,
        "tokens_per_step": sum(row["tokens"] for row in rows) / sum(row["steps"] for row in rows),
        "rows": rows,
        "faults": faults,
    }


def timed(
    generator: Generator, question: str, max_new_tokens: int, *, speculate: bool
) -> tuple[GenerationResult, dict[str, float]]:
    """Return an answer and its speeds."""
    start = time.perf_counter()
    result = generator.generate(question, max_new_tokens=max_new_tokens, speculate=speculate)
    seconds = time.perf_counter() - start
    speeds = {
        "tokens_per_second": len(result.tokens) / seconds,
        "decode_tokens_per_second": result.decode_tokens_per_second,
        "time_to_first_token_s": result.time_to_first_token_s,
    }
    return result, speeds


def first_difference(generator: Generator, question: str, plain: list[int], fast: list[int]) -> dict[str, Any] | None:
    """Return where two answers part, the gap between the logits of the two tokens there, and its share of the largest
    logit; None where they are the same.
    """
    if plain == fast:
        return None
    position = next((i for i, (a, b) in enumerate(zip(plain, fast, strict=False)) if a != b), None)
    if position is None:
        return {"position": min(len(plain), len(fast)), "gap": None, "relative_gap": None}
    logits = logits_after(generator, generator.encode(question) + plain[:position])
    gap = abs(float(logits[plain[position]] - logits[fast[position]]))
    return {"position": position, "gap": gap, "relative_gap": gap / float(np.abs(logits).max())}


def logits_after(generator: Generator, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Return the engine's logits [V] for what follows `tokens`."""
    engine = engine_of(generator)
    slot = engine.new_slot()
    for start in range(0, len(tokens), generator.about.prompt_chunk):
        chunk = tokens[start : start + generator.about.prompt_chunk]
        result = engine.run(Batch.of([prompt_rows(chunk, engine.dims.join_order, start)], [slot]))
        logits = result.outputs(0).logits[0].copy()
        engine.commit(result, [range(len(chunk))])
    return logits


def compare_reference(
    generator: Generator, limits: Limits, path: Path, questions: Sequence[str], max_new_tokens: int, seed: int
) -> dict[str, Any]:
    """Compare outputs and tokens with those of the fp32 engine of the same model at `path`, on the CPU.

    `tokens` are the engine's own answers, read by the reference: how many it would have chosen too, and the largest
    gap, relative to the largest logit, between its choice and the engine's.
    """
    judge = Generator(path, device="cpu", prefix_cache_bytes=0)
    wanted = replace(generator.about.dims, dtype="float32")
    same = all(getattr(judge.about, name) == getattr(generator.about, name) for name in ("base_model", "transfer"))
    if judge.about.dims != wanted or not same:
        raise InputError(
            f"{path} is no reference for this engine: it must have the same model and transfer layers, in fp32"
        )
    dtype = generator.about.dims.dtype
    theirs = engine_of(judge)
    outputs = list(compare_outputs(engine_of(generator), theirs, limits, seed))
    faults = [f"{row} is beyond {TOLERANCE[dtype]:.0e}" for row in outputs if not is_within(row, TOLERANCE[dtype])]
    gaps = []
    firsts = []
    for question in questions:
        prompt = generator.encode(question)
        tokens = generator.generate(question, max_new_tokens=max_new_tokens).tokens
        found = token_gaps(theirs, prompt, tokens, limits.chunk)
        gaps.append(found)
        firsts.append(next((int(i) for i in np.flatnonzero(found)), None))
        if not is_tie(finite(found.max()), dtype):
            faults.append(f"a token is {found.max():.1e} behind the reference's, {question!r}")
    every = np.concatenate(gaps)
    tokens_report = {
        "count": len(every),
        "same": int((every == 0).sum()),
        "largest_relative_gap": finite(every.max()),
        "first_differences": firsts,
    }
    return {"outputs": outputs, "tokens": tokens_report, "faults": faults}


def token_gaps(engine: Engine, prompt: Sequence[int], tokens: Sequence[int], chunk: int) -> NDArray[np.float64]:
    """Return [N]: how far the logit of each of `tokens` is behind the engine's best, relative to its largest.

    A token is judged after those before it, whether or not the engine would have chosen them.
    """
    ids = [*prompt, *tokens[:-1]]
    nothing = (np.empty(0, dtype=np.int64),) * engine.dims.num_steps
    slot = engine.new_slot()
    gaps: list[float] = []
    for start in range(0, len(ids), chunk):
        tree = chain(ids[start : start + chunk])
        first = len(prompt) - 1 - start
        wanted = np.arange(min(max(first, 0), len(tree) - 1), len(tree), dtype=np.int64)
        rows = lay_out(tree, nothing, engine.dims.join_order, start, logit_rows=wanted)
        result = engine.run(Batch.of([rows], [slot]))
        engine.commit(result, [range(len(tree))])
        outputs = result.outputs(0)
        for index, row in enumerate(wanted.tolist()):
            if row >= first:
                logits = outputs.logits[index]
                behind = float(logits.max() - logits[tokens[len(gaps)]])
                gaps.append(behind / float(np.abs(logits).max()))
    return np.array(gaps)


def latency(path: Path, about: EngineFile, limits: Limits, seed: int, *, use_graphs: bool) -> dict[str, Any]:
    """Return the median time of passes by rows and context, and how many sizes there was no time for."""
    engine = open_engine(path, about, use_graphs)
    end = time.monotonic() + LATENCY_SECONDS
    measured = list(pass_times(engine, limits, seed, lambda: time.monotonic() < end))
    found = {"rows": [row for row in measured if row is not None], "left_out": measured.count(None)}
    # A plan tells how many shapes could not be captured as a CUDA graph.
    if use_graphs and (refused := getattr(engine, "refused", 0)):
        found["faults"] = [f"{refused} shapes could not be captured as a CUDA graph"]
    return found


def over_requests(path: Path, about: EngineFile, limits: Limits, seed: int) -> dict[str, Any]:
    """Return the median time of steps by the number of requests, and how many sizes there was no time for."""
    engine = open_engine(path, about, True)
    end = time.monotonic() + LATENCY_SECONDS
    measured = list(request_times(engine, limits, seed, lambda: time.monotonic() < end))
    return {"rows": [row for row in measured if row is not None], "left_out": measured.count(None)}


def is_tie(relative_gap: float | None, dtype: str) -> bool:
    """Return whether rounding alone may choose between two tokens with this gap between their logits."""
    return relative_gap is not None and relative_gap <= TIE[dtype]
