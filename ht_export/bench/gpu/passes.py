"""Passes of random rows through an engine, for `ht-bench gpu`: their outputs, and how long they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ht_export.bench.gpu.parts import finite
from ht_export.verify.random_trees import random_chain, random_ends, random_tree
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import Limits
from runtime.engines.protocol import Batch, Engine, Slot
from runtime.rows import LogitRows, Rows, lay_out, prompt_rows

# The most that outputs may differ from those of an fp32 engine on the CPU, relative to the largest of the pass.
# SmolLM2-135M in PyTorch differs by 3e-3 in fp16 and 4e-2 in bf16; what is wrong differs by about 1.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1.5e-1}
TREE_ROWS = (1, 4, 8, 16, 32)
CONTEXTS = (128, 512, 2048)
WARMUP, REPEATS = 5, 30
REQUESTS = (1, 2, 4, 8, 16, 32, 64)
# Enough for the cache to outgrow its first capacity.
COMPARED_CONTEXT = 300


def compare_shapes(engine: Engine, limits: Limits, seed: int) -> dict[str, Any]:
    """Compare the logits of one token in a pass of its own with those in passes of more rows, which it does not see.

    In half precision they differ: by so much plain decoding would differ from itself.
    """
    dims = engine.dims
    rng = np.random.default_rng(seed)
    slot = engine.new_slot()
    fill(engine, slot, rng, min(100, limits.max_context // 2), limits.chunk)
    alone: NDArray[np.float32] | None = None
    rows, faults = [], []
    for count in tree_sizes(limits):
        asked = random_rows(dims, rng, slot.length, count, pseudo_rows(dims, count))
        asked.input_ids[0] = 1
        logits = engine.run(Batch.of([asked], [slot])).outputs(0).logits[0].copy()
        if alone is None:
            alone = logits
            continue
        found = difference(logits[None], alone[None])
        rows.append({"tree_rows": count, **found})
        if not is_within(found, TOLERANCE[dims.dtype]):
            faults.append(f"a token's logits depend on {count - 1} rows that it does not see: {found}")
    return {"rows": rows, "faults": faults}


def compare_outputs(engine: Engine, reference: Engine, limits: Limits, seed: int) -> Iterator[dict[str, Any]]:
    """Run random passes in both engines, each over the cache that it made itself; yield how each output differs."""
    dims = engine.dims
    rng = np.random.default_rng(seed)
    mine, theirs = engine.new_slot(), reference.new_slot()
    for case, chained, count, pseudo in compared_passes(dims, limits):
        rows = random_rows(dims, rng, mine.length, count, pseudo, chained=chained)
        results = engine.run(Batch.of([rows], [mine])), reference.run(Batch.of([rows], [theirs]))
        found, expected = (result.outputs(0) for result in results)
        for name in ("logits", "draft_logits"):
            values, wanted = stacked(getattr(found, name)), stacked(getattr(expected, name))
            if len(wanted):
                yield {"case": case, "context": mine.length, "output": name, **difference(values, wanted)}
        # The way to a tree's last node: its rows need not lie together.
        accepted = range(count) if chained else np.flatnonzero(rows.tree_mask[count - 1, :count]).tolist()
        engine.commit(results[0], [accepted])
        reference.commit(results[1], [accepted])


def stacked(rows: LogitRows) -> NDArray[np.float32]:
    """Return rows of logits, wherever they are, as one array [N, V]."""
    return np.array([rows[row] for row in range(len(rows))])


def compared_passes(dims: GraphDims, limits: Limits) -> Iterator[tuple[str, bool, int, tuple[int, ...]]]:
    """Yield each pass's name, whether it is a chunk of a prompt, its tree rows and its pseudo rows."""
    nothing, one = (0,) * dims.num_steps, (1,) * dims.num_steps
    for _ in range(max(1, min(COMPARED_CONTEXT, limits.max_context // 2) // limits.chunk)):
        yield "prompt", True, min(limits.chunk, limits.max_context // 2), nothing
    yield "prompt's end", True, min(5, limits.chunk), one
    tree = min(9, limits.max_rows)
    yield "tree", False, tree, tuple(max(1, tree - 3 - 2 * k) for k in range(dims.num_steps))
    few = min(4, limits.max_rows)
    yield "tree, first step only", False, few, (few, *nothing[1:])
    yield "plain", False, 1, nothing
    largest = tree_sizes(limits)[-1]
    yield "largest tree", False, largest, (largest,) * dims.num_steps


def pass_times(
    engine: Engine, limits: Limits, seed: int, in_time: Callable[[], bool]
) -> Iterator[dict[str, Any] | None]:
    """Yield the median time of a pass of each size over each context; None once it is too late for it.

    One row drafts nothing, as in plain decoding; more have a pseudo row of each step for every one of them.
    """
    rng = np.random.default_rng(seed)
    slot = engine.new_slot()
    for context in contexts(limits):
        fill(engine, slot, rng, context, limits.chunk)
        for count in tree_sizes(limits):
            if not in_time():
                yield None
                continue
            pseudo = pseudo_rows(engine.dims, count)
            rows = random_rows(engine.dims, rng, context, count, pseudo)
            batch = Batch.of([rows], [slot])
            for _ in range(WARMUP):
                engine.run(batch)
            times = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                engine.run(batch)
                times.append((time.perf_counter() - start) * 1e3)
            low, median, high = statistics.quantiles(times, n=4)
            yield {
                "context": context,
                "tree_rows": count,
                "pseudo_rows": sum(pseudo),
                "ms": median,
                "quartiles_ms": [low, high],
            }


def request_times(
    engine: Engine, limits: Limits, seed: int, in_time: Callable[[], bool]
) -> Iterator[dict[str, Any] | None]:
    """Yield the median time of a step of so many requests, as many as the engine takes, over the shortest context: a
    pass and the commit of its root, for trees of several sizes; None once it is too late for it.
    """
    rng = np.random.default_rng(seed)
    # Every repeat makes the context longer by one.
    steps = 2 * (WARMUP + REPEATS)
    context = max(1, min(contexts(limits)[0], limits.max_context - steps - 1))
    most = min(engine.max_batch, engine.max_slots)
    for count in [count for count in REQUESTS if count <= most]:
        first = engine.new_slot()
        fill(engine, first, rng, context, limits.chunk)
        slots = [first, *(engine.new_slot() for _ in range(count - 1))]
        for slot in slots[1:]:
            engine.copy(first, slot, context)
        for tree_rows in tree_sizes(limits)[:2]:
            if not in_time():
                yield None
                continue
            pseudo = pseudo_rows(engine.dims, tree_rows)
            times = []
            for _ in range(WARMUP + REPEATS):
                rows = [random_rows(engine.dims, rng, slot.length, tree_rows, pseudo) for slot in slots]
                start = time.perf_counter()
                engine.commit(engine.run(Batch.of(rows, slots)), [(0,)] * count)
                times.append((time.perf_counter() - start) * 1e3)
            ms = statistics.median(times[WARMUP:])
            yield {"requests": count, "context": context, "tree_rows": tree_rows, "ms": ms}
        for slot in slots:
            engine.release(slot)


def contexts(limits: Limits) -> list[int]:
    """Return the context lengths to time, that the engine can hold."""
    return [length for length in CONTEXTS if length < limits.max_context] or [limits.max_context // 2]


def tree_sizes(limits: Limits) -> list[int]:
    """Return the tree rows to time, that the engine takes."""
    return [count for count in TREE_ROWS if count <= limits.max_rows]


def pseudo_rows(dims: GraphDims, tree_rows: int) -> tuple[int, ...]:
    """Return the pseudo rows of each step of a tree: none for plain decoding's one row, else one for each row."""
    return (tree_rows if tree_rows > 1 else 0,) * dims.num_steps


def fill(engine: Engine, slot: Slot, rng: np.random.Generator, length: int, chunk: int) -> None:
    """Bring a slot to `length` rows, with a prompt of random tokens."""
    nothing = (0,) * engine.dims.num_steps
    while slot.length < length:
        count = min(chunk, length - slot.length)
        rows = random_rows(engine.dims, rng, slot.length, count, nothing, chained=True)
        engine.commit(engine.run(Batch.of([rows], [slot])), [range(count)])


def random_rows(
    dims: GraphDims,
    rng: np.random.Generator,
    start: int,
    tree_rows: int,
    pseudo_counts: Sequence[int],
    *,
    chained: bool = False,
) -> Rows:
    """Return rows of random tokens: a random tree, or `chained` a chunk of a prompt, whose last row alone has logits
    and pseudo rows.
    """
    if chained:
        tokens = random_chain(rng, dims.vocab_size, tree_rows).tokens.tolist()
        return prompt_rows(tokens, dims.join_order, start, sum(pseudo_counts))
    tree = random_tree(rng, dims.vocab_size, tree_rows)
    return lay_out(tree, random_ends(rng, tree_rows, pseudo_counts), dims.join_order, start)


def difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> dict[str, Any]:
    """Return the largest difference of logits [N, V], also relative to the largest expected one, and the share of rows
    with the same best token.
    """
    absolute = float(np.abs(found - expected).max())
    return {
        "absolute": finite(absolute),
        "relative": finite(absolute / float(np.abs(expected).max())),
        "same_argmax": float((found.argmax(-1) == expected.argmax(-1)).mean()),
    }


def is_within(found: dict[str, Any], tolerance: float) -> bool:
    """Return whether a `difference` is a number, and small enough."""
    return found["relative"] is not None and found["relative"] <= tolerance
