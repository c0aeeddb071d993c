"""Measures how long an engine's steps take on a device.

A menu of sizes is timed quickly at first load; `ht-bench tune` takes its time, and decodes prompts too. What was found
is kept beside the engine: see `runtime.bundle.tuning_file`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from runtime.bundle.engine_file import EngineFile
from runtime.bundle.tuning_file import Tuning, read_tuning, write_tuning
from runtime.decode import DecodingState, drafts_of, verify
from runtime.drafting.best_first import likely_ends
from runtime.drafting.drafter import Drafter
from runtime.drafting.drafts import DraftStep
from runtime.drafting.sizing import BatchMenu, FixedSizes, Menu, Sizing
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.engines.protocol import Batch, Engine
from runtime.errors import InputError
from runtime.program import Advance
from runtime.rows import lay_out, prompt_rows
from runtime.sampling.choice import ArgMax
from runtime.tree import TreeSizes, chain

# Seconds that measuring at first load may take, more or less.
QUICK_SECONDS = 4.0
QUICK_CONTEXTS = (128, 1024)
QUICK_REPEATS = 4
# Requests of a pass; and seconds that measuring them may take, more or less.
QUICK_COUNTS = (2, 4, 8)
BATCHES = (2, 4, 8, 16)
QUICK_BATCH_SECONDS = 6.0
QUICK_BATCH_REPEATS = 8
# Rows of a pass that fills the cache.
FILL_CHUNK = 64
# Draft steps behind these are tried and left out.
FIRST_STEPS = 3
# Products of 7 to 12 rows take the same time in ONNX Runtime's kernels for AVX-512, so that a tree of 12 may pay where
# one of 8 does.
MOST_TIMES = 3
# The quantile of the repeats that counts: what disturbs a pass makes it longer only.
QUANTILE = 0.25

# Returns what drafts one text, with the sizes given.
NewDrafter = Callable[[Sizing], Drafter]


def default_drafter(sizing: Sizing) -> Drafter:
    """Return what drafts a text by transfer layers alone."""
    return Drafter(sizing, [TransferDrafts()])


def cpu_name(threads: int | None) -> str:
    """Return the name of this machine's CPU with the number of threads."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    used = f"{threads} threads" if threads else f"all threads of {cores} cores"
    return f"{model or platform.processor() or platform.machine()}, {used}"


def device_name(engine: Engine, threads: int | None) -> str:
    """Return what the engine runs on: the GPU's name, or the CPU's with the number of threads."""
    return engine.gpu_name or cpu_name(threads)


def menu_sizes(default: TreeSizes) -> tuple[TreeSizes, ...]:
    """Return the sizes worth measuring where `default` are the engine's own, plain decoding first, then those.

    Trees of up to `MOST_TIMES` the rows, each without pseudo rows, with some for its likeliest ends, and with one for
    every node in the proportions of `default`; where there are more draft steps than `FIRST_STEPS`, with those alone as
    well: the drafts of later ones are right less often, and their pseudo rows cost as much.
    """
    steps = len(default.pseudo_rows)
    most = MOST_TIMES * default.tree_rows
    rows = sorted(
        {count for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if count <= most} | {default.tree_rows}
    )
    found = [TreeSizes.plain(steps), default]
    for count in rows:
        whole = tuple(-(-count * own // default.tree_rows) for own in default.pseudo_rows)
        few = tuple(min(2, count, own) for own in whole)
        one = tuple(min(1, own) for own in whole)
        found += [TreeSizes(count, pseudo) for pseudo in ((0,) * steps, one, few, whole)]
        later = (0,) * (steps - FIRST_STEPS)
        found += [TreeSizes(count, (*pseudo[:FIRST_STEPS], *later)) for pseudo in (few, whole)]
    return tuple(dict.fromkeys(found))


def measure(
    engine: Engine,
    sizes: Sequence[TreeSizes],
    contexts: Sequence[int],
    repeats: int,
    seconds: float = float("inf"),
    progress: Advance | None = None,
    new_drafter: NewDrafter = default_drafter,
) -> Menu:
    """Return the menu of `sizes`, the first of which are those of plain decoding, timed at each of `contexts`, which
    ascend. What is timed is a step: the pass, and what drafts for it and after it, as `new_drafter` makes it.

    All sizes take turns, so that a machine that slows down slows all of them. Where `seconds` are short it makes do
    with fewer repeats, with contexts as long as there was time to fill, or fewer, and with the first of the sizes, two
    at least.
    """
    steps = _Steps(engine, sizes, new_drafter)
    start = time.perf_counter()
    reached: list[int] = []
    best: list[list[float]] = []
    total = len(contexts) * len(sizes) * repeats
    for number, context in enumerate(contexts):
        # A third of each context's share is for filling the cache, another for the first turn of every size.
        filled, turned, end = (start + seconds * (number + share / 3) / len(contexts) for share in (1, 2, 3))
        # Without a first turn there is nothing to choose from.
        turned = turned if best else start + seconds * 2 / 3
        steps.fill(context, filled)
        if best and (steps.length == reached[-1] or time.perf_counter() + 2 * sum(best[-1]) > end):
            break
        taken: list[list[float]] = []
        for size in sizes:
            if not best and len(taken) > 1 and time.perf_counter() > turned:
                break
            # Sets up what steps of this shape need.
            steps.time(size)
            taken.append([steps.time(size)])
            if progress:
                progress(number * len(sizes) * repeats + len(taken), total)
        sizes = sizes[: len(taken)]
        for repeat in range(1, repeats):
            if time.perf_counter() > end:
                break
            for size, times in zip(sizes, taken, strict=True):
                times.append(steps.time(size))
            if progress:
                progress((number * repeats + repeat + 1) * len(sizes), total)
        reached.append(steps.length)
        best.append([float(np.quantile(times, QUANTILE)) for times in taken])
    return Menu(tuple(sizes), tuple(reached), np.array(best)).settled()


def measure_batches(
    engine: Engine,
    sizes: Sequence[TreeSizes],
    contexts: Sequence[int],
    counts: Sequence[int],
    repeats: int,
    seconds: float = float("inf"),
    progress: Advance | None = None,
    new_drafter: NewDrafter = default_drafter,
) -> list[BatchMenu]:
    """Return the menus of passes of so many requests (`counts`, which ascend) that the engine takes together, all of
    them of one of `sizes`, the first of which are those of plain decoding.

    All sizes take turns, as in `measure`. Where `seconds` are short there are fewer repeats, and menus for the first
    counts alone.
    """
    start = time.perf_counter()
    found: list[BatchMenu] = []
    counts = [count for count in counts if 1 < count <= min(engine.max_batch, engine.max_slots)]
    total = len(counts) * len(contexts) * (repeats + 1)
    for number, count in enumerate(counts):
        rows: list[list[float]] = []
        for place, context in enumerate(contexts):
            steps = _Steps(engine, sizes, new_drafter, count)
            steps.fill(context, float("inf"))
            end = start + seconds * (number * len(contexts) + place + 1) / len(counts) / len(contexts)
            # The first turn sets up what steps of each shape need.
            taken: list[list[float]] = [[] for _ in sizes]
            for turn in range(repeats + 1):
                if turn > 1 and time.perf_counter() > end:
                    break
                for size, times in zip(sizes, taken, strict=True):
                    times.append(steps.time(size))
                if progress:
                    progress((number * len(contexts) + place) * (repeats + 1) + turn + 1, total)
            rows.append([float(np.quantile(times[1:], QUANTILE)) for times in taken])
        found.append(BatchMenu(count, Menu(tuple(sizes), tuple(contexts), np.array(rows)).settled()))
        if time.perf_counter() - start > seconds:
            break
    return found


class _Steps:
    """Steps over a cache whose rows have no meaning: their time does not depend on what they hold.

    They are of `count` requests. One slot that grows is filled, and copied to the others.
    """

    def __init__(self, engine: Engine, sizes: Sequence[TreeSizes], new_drafter: NewDrafter, count: int = 1) -> None:
        self._engine = engine
        self._slot = engine.new_slot()
        self._others = [engine.new_slot() for _ in range(count - 1)]
        self._drafters = {one: new_drafter(FixedSizes(one)) for one in sizes}
        self._drafted: list[DraftStep] = []

    @property
    def length(self) -> int:
        return self._slot.length

    def fill(self, context: int, until: float) -> None:
        """Have `context` rows in the cache, or as many as the time `until` allows."""
        while self.length < context and time.perf_counter() < until:
            count = min(FILL_CHUNK, context - self.length)
            rows = prompt_rows([0] * count, self._engine.dims.join_order, self.length)
            self._engine.commit(self._engine.run(Batch.of([rows], [self._slot])), [range(count)])
        for slot in self._others:
            self._engine.copy(self._slot, slot, self.length)

    def time(self, sizes: TreeSizes) -> float:
        """Return the seconds of a step."""
        drafter = self._drafters[sizes]
        drafted = self._drafted if sizes.tree_rows > 1 else []
        join_order = self._engine.dims.join_order
        slots = [self._slot, *self._others]
        start = time.perf_counter()
        laid_out = []
        for _ in slots:
            drafter.accept([0])
            tree, ends = drafter.propose(0, drafted, self.length)
            if len(tree) < sizes.tree_rows:
                # Too few drafts to build it of.
                tree = chain([0] * sizes.tree_rows)
                ends = likely_ends(tree, sizes.pseudo_rows)
            wanted = ArgMax()
            shortlist = max(1, drafter.shortlist)
            laid_out.append((tree, lay_out(tree, ends, join_order, self.length, wanted=wanted, shortlist=shortlist)))
        result = self._engine.run(Batch.of([rows for _, rows in laid_out], slots))
        for index, (tree, _) in enumerate(laid_out):
            outputs = result.outputs(index)
            verify(tree, outputs, DecodingState([0], drafter, FILL_CHUNK, join_order))
            # A node that all steps draft for, if there is one.
            node = int(ends[sizes.draft_steps - 1][0]) if sizes.draft_steps else 0
            found = drafts_of(node, outputs, join_order, drafter.draft_tokens)
        seconds = time.perf_counter() - start
        drafted = found
        if len(drafted) >= max(1, len(self._drafted)):
            self._drafted = drafted
        return seconds


def quick(
    engine: Engine,
    default: TreeSizes,
    max_context: int,
    device: str,
    engine_sha256: str,
    new_drafter: NewDrafter = default_drafter,
) -> Tuning:
    """Measure `engine` for at most some seconds."""
    plain, own, *others = menu_sizes(default)
    sizes = [plain, own, *(one for one in others if one.tree_rows < max_context)]
    room = max_context - max(one.tree_rows for one in sizes) - 1
    contexts = sorted({max(0, min(context, room)) for context in QUICK_CONTEXTS})
    start = time.perf_counter()
    menu = measure(engine, sizes, contexts, QUICK_REPEATS, QUICK_SECONDS, new_drafter=new_drafter)
    batches = quick_batches(engine, default, contexts[:1], new_drafter)
    about = {"seconds": round(time.perf_counter() - start, 2), "repeats": QUICK_REPEATS}
    return Tuning(device, engine_sha256, menu, about=about, batches=tuple(batches))


def batch_sizes(default: TreeSizes) -> tuple[TreeSizes, ...]:
    """Return the sizes worth measuring for several requests, plain decoding first: few, as small trees alone pay, and
    for them the first draft steps.
    """
    steps = len(default.pseudo_rows)
    found = [TreeSizes.plain(steps)]
    for rows in sorted({2, default.tree_rows // 2, default.tree_rows}):
        most = [min(rows, own) for own in default.pseudo_rows]
        variants = [[0] * steps, [min(1, most[0])], most[:1], most[:2], most]
        found += [TreeSizes(rows, tuple([*counts, *[0] * steps][:steps])) for counts in variants if rows > 1]
    return tuple(dict.fromkeys(found))


def quick_batches(
    engine: Engine, default: TreeSizes, contexts: Sequence[int], new_drafter: NewDrafter
) -> list[BatchMenu]:
    """Measure passes of several requests for at most some seconds."""
    every = batch_sizes(default)
    # With few of them all numbers of requests have their turn.
    small = [one for one in every if one.tree_rows == 2][:3]
    sizes = list(dict.fromkeys([every[0], *small, every[-1]]))
    return measure_batches(
        engine, sizes, contexts, QUICK_COUNTS, QUICK_BATCH_REPEATS, QUICK_BATCH_SECONDS, new_drafter=new_drafter
    )


def load_or_measure(
    path: Path, engine: Engine, about: EngineFile, device: str, new_drafter: NewDrafter, *, on_cpu: bool
) -> Tuning | None:
    """Return what was measured of the engine at `path` on this device; on a CPU it is measured quickly if nothing was.

    Raises `EngineFileError` for a damaged file of tunings.
    """
    found = read_tuning(path, about.identity, device, about.dims)
    together = engine.max_batch > 1 and engine.max_slots > 1
    if found is None and on_cpu:
        found = quick(engine, about.tree, about.max_context, device, about.identity, new_drafter)
    elif found is not None and on_cpu and together and not found.batches:
        # Measured by an earlier release, or by itself.
        contexts = [max(0, min(QUICK_CONTEXTS[0], about.max_context - about.tree.tree_rows - 1))]
        found = replace(found, batches=tuple(quick_batches(engine, about.tree, contexts, new_drafter)))
    else:
        return found
    if found is not None:
        # Where it cannot be kept it is measured again the next time.
        with contextlib.suppress(InputError):
            write_tuning(path, found)
    return found
