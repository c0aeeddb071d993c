"""How long an engine's steps take on a device: measured once, stored beside the engine, used by every load after.

`engine.tuning.json` has an entry for each device and number of threads, with the engine's hash: a menu of sizes with
seconds of each, and what to begin with (see `runtime.sizing.AdaptiveSizes`). A quick one is measured at first load;
`ht-bench tune` takes its time, and decodes prompts too.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bindings import GraphDims
from runtime.drafter import Drafter
from runtime.drafts import DraftStep
from runtime.engines import Engine
from runtime.errors import EngineFileError
from runtime.files import write_json
from runtime.loop import drafts_of, greedy, verify
from runtime.sizing import FixedSizes, Menu, Sizing
from runtime.tree import MOST_ROWS, TreeSizes, chain, lay_out, likely_ends

FORMAT = "hidden-transfer-tuning"
FORMAT_VERSION = 1
# Seconds that measuring at first load may take, more or less.
QUICK_SECONDS = 4.0
QUICK_CONTEXTS = (128, 1024)
QUICK_REPEATS = 4
# Rows of a pass that fills the cache.
FILL_CHUNK = 64
# Of the repeats the one that this share of them was faster than: what disturbs a pass makes it longer only.
QUANTILE = 0.25

# Told the steps done and to do.
Progress = Callable[[int, int], None]
# Returns what drafts one text, with the sizes given.
NewDrafter = Callable[[Sizing], Drafter]


@dataclass(frozen=True)
class Tuning:
    """What was measured of one engine on one device.

    `engine_sha256` is the engine's identity; `rate` and `draft_value` are as for `AdaptiveSizes`. `kind` is "quick" or
    "full"; `about` tells how it was measured.
    """

    device: str
    engine_sha256: str
    menu: Menu
    rate: float = 1.0
    draft_value: float = 0.5
    kind: str = "quick"
    about: dict[str, Any] = field(default_factory=dict)


def tuning_path(engine: Path) -> Path:
    """Return where the tunings of `engine` are kept."""
    return engine.with_suffix(".tuning.json")


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
    return getattr(engine, "gpu_name", None) or cpu_name(threads)


def menu_sizes(default: TreeSizes) -> tuple[TreeSizes, ...]:
    """Return the sizes worth measuring where `default` are the engine's own, plain decoding first, then those.

    Trees of up to twice the rows, each without pseudo rows, with some for its likeliest ends, and with one for every
    node in the proportions of `default`.
    """
    steps = len(default.pseudo_rows)
    most = 2 * default.tree_rows
    rows = sorted(
        {count for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if count <= most} | {default.tree_rows}
    )
    found = [TreeSizes.plain(steps), default]
    for count in rows:
        whole = tuple(-(-count * own // default.tree_rows) for own in default.pseudo_rows)
        few = tuple(min(2, count, own) for own in whole)
        one = tuple(min(1, own) for own in whole)
        found += [TreeSizes(count, pseudo) for pseudo in ((0,) * steps, one, few, whole)]
    return tuple(dict.fromkeys(found))


def measure(
    engine: Engine,
    sizes: Sequence[TreeSizes],
    contexts: Sequence[int],
    repeats: int,
    seconds: float = float("inf"),
    progress: Progress | None = None,
    new_drafter: NewDrafter = Drafter,
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
    return Menu(tuple(sizes), tuple(reached), np.array(best))


class _Steps:
    """Steps over a cache whose rows have no meaning: their time does not depend on what they hold.

    One cache that grows, as on a GPU only the newest of an engine may be used.
    """

    def __init__(self, engine: Engine, sizes: Sequence[TreeSizes], new_drafter: NewDrafter) -> None:
        self._engine = engine
        self._cache = engine.new_cache()
        self._drafters = {one: new_drafter(FixedSizes(one)) for one in sizes}
        self._drafted: list[DraftStep] = []

    @property
    def length(self) -> int:
        return self._cache.length

    def fill(self, context: int, until: float) -> None:
        """Have `context` rows in the cache, or as many as the time `until` allows."""
        nothing = (np.empty(0, dtype=np.int64),) * self._engine.dims.num_steps
        while self.length < context and time.perf_counter() < until:
            tree = chain([0] * min(FILL_CHUNK, context - self.length))
            last = np.array([len(tree) - 1], dtype=np.int64)
            rows = lay_out(tree, nothing, self._engine.dims.join_order, self.length, logit_rows=last)
            self._cache.commit(self._engine.run(rows, self._cache), range(len(tree)))

    def time(self, sizes: TreeSizes) -> float:
        """Return the seconds of a step."""
        drafter = self._drafters[sizes]
        drafted = self._drafted if sizes.tree_rows > 1 else []
        start = time.perf_counter()
        tree, ends = drafter.propose(0, drafted, self.length)
        if len(tree) < sizes.tree_rows:
            # Too few drafts to build it of.
            tree = chain([0] * sizes.tree_rows)
            ends = likely_ends(tree, sizes.pseudo_rows)
        rows = lay_out(tree, ends, self._engine.dims.join_order, self.length)
        outputs = self._engine.run(rows, self._cache)
        verify(tree, outputs.logits, greedy)
        # A node that all steps draft for, if there is one.
        node = int(ends[sizes.draft_steps - 1][0]) if sizes.draft_steps else 0
        drafted = drafts_of(node, rows, outputs, self._engine.dims.join_order, drafter.shortlist)
        seconds = time.perf_counter() - start
        if len(drafted) >= max(1, len(self._drafted)):
            self._drafted = drafted
        return seconds


def quick(
    engine: Engine,
    default: TreeSizes,
    max_context: int,
    device: str,
    engine_sha256: str,
    new_drafter: NewDrafter = Drafter,
) -> Tuning:
    """Measure `engine` for at most some seconds."""
    room = max_context - 2 * default.tree_rows - 1
    contexts = sorted({max(0, min(context, room)) for context in QUICK_CONTEXTS})
    start = time.perf_counter()
    menu = measure(engine, menu_sizes(default), contexts, QUICK_REPEATS, QUICK_SECONDS, new_drafter=new_drafter)
    about = {"seconds": round(time.perf_counter() - start, 2), "repeats": QUICK_REPEATS}
    return Tuning(device, engine_sha256, menu, about=about)


def read_tuning(engine: Path, engine_sha256: str, device: str, dims: GraphDims) -> Tuning | None:
    """Return the tuning of `engine` on `device`, None when there is none of this engine.

    Raises `EngineFileError` when the file is damaged or of another version.
    """
    path = tuning_path(engine)
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT or value["version"] != FORMAT_VERSION:
            raise ValueError(f"version ({value['version']!r})")
        entries = [entry for entry in value["tunings"] if entry["device"] == device]
        own = [entry for entry in entries if entry["engine_sha256"] == engine_sha256]
        return _parse(own[0], dims) if own else None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
        raise EngineFileError(
            f"{path} lacks or misstates {error}; delete it, and it is measured again, or run: ht-bench tune {engine}"
        ) from error


def write_tuning(engine: Path, tuning: Tuning) -> None:
    """Put `tuning` beside `engine`, in the place of what there was for its device. Raises `InputError`."""
    path = tuning_path(engine)
    kept: list[Any] = []
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        kept = [
            entry
            for entry in value["tunings"]
            if value["version"] == FORMAT_VERSION
            and entry["device"] != tuning.device
            and entry["engine_sha256"] == tuning.engine_sha256
        ]
    except (OSError, ValueError, KeyError, TypeError):
        # None yet, or none to keep.
        kept = []
    entry = {
        "device": tuning.device,
        "engine_sha256": tuning.engine_sha256,
        "kind": tuning.kind,
        "rate": tuning.rate,
        "draft_value": tuning.draft_value,
        "contexts": list(tuning.menu.contexts),
        "sizes": [
            {
                "tree_rows": sizes.tree_rows,
                "pseudo_rows": list(sizes.pseudo_rows),
                "milliseconds": [round(1e3 * float(seconds), 4) for seconds in tuning.menu.seconds[:, number]],
            }
            for number, sizes in enumerate(tuning.menu.sizes)
        ],
        "about": tuning.about,
    }
    write_json(path, {"format": FORMAT, "version": FORMAT_VERSION, "tunings": [*kept, entry]})


def _parse(entry: dict[str, Any], dims: GraphDims) -> Tuning:
    sizes = tuple(TreeSizes(one["tree_rows"], tuple(one["pseudo_rows"])) for one in entry["sizes"])
    contexts = tuple(entry["contexts"])
    seconds = np.array([one["milliseconds"] for one in entry["sizes"]], dtype=np.float64).T / 1e3
    for one in sizes:
        whole = all(isinstance(rows, int) and rows >= 0 for rows in (one.tree_rows, *one.pseudo_rows))
        if not whole or not 1 <= one.tree_rows <= MOST_ROWS or len(one.pseudo_rows) != dims.num_steps:
            raise ValueError(f"sizes ({one})")
    if not sizes or sizes[0] != TreeSizes.plain(dims.num_steps):
        raise ValueError("sizes (the first are not those of plain decoding)")
    whole = all(isinstance(context, int) and context >= 0 for context in contexts)
    if not whole or not contexts or list(contexts) != sorted(set(contexts)):
        raise ValueError(f"contexts ({contexts})")
    if seconds.shape != (len(contexts), len(sizes)) or not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise ValueError("milliseconds")
    rate, value = float(entry["rate"]), float(entry["draft_value"])
    if not (np.isfinite(rate) and rate > 0 and np.isfinite(value) and value >= 0):
        raise ValueError(f"rate or draft_value ({rate}, {value})")
    if not isinstance(entry["about"], dict):
        raise ValueError("about")
    menu = Menu(sizes, contexts, seconds)
    return Tuning(entry["device"], entry["engine_sha256"], menu, rate, value, entry["kind"], entry["about"])
