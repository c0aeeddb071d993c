"""Part 1: is the kernel right on this GPU, and how fast; nothing but torch, Triton and what launches kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from ht_export.bench.gpu.cases import Case, cases
from ht_export.bench.gpu.commits import CompiledCommit, check_commits
from ht_export.bench.gpu.compiled import Kernel, KernelKey
from ht_export.bench.gpu.kernel import check_cases, check_graph, what_is_missing
from ht_export.bench.gpu.other_kernels import installed
from ht_export.bench.gpu.timing import (
    MODELS,
    TIMED_CONTEXTS,
    TIMED_ROWS,
    PreparedKernel,
    Timed,
    measure_bandwidth,
    time_one,
)
from ht_export.gpu_day.kernels import every_key, held_kernels
from ht_export.gpu_day.machine import on_gpu
from ht_export.gpu_day.settings import DaySettings, NotHereError
from ht_export.gpu_day.stages import Sections

# The goal: of contexts so long and so many rows, at least this share of the measured bandwidth.
GOAL_CONTEXT, GOAL_ROWS, GOAL_SHARE = 8192, (32, 64, 128), 0.75
FIRST_CASES = 400
COMMITS = 100
BATCHED = tuple(
    Timed(model, context, rows, batch, ragged)
    for model, batch in (("llama-3-8b", 8), ("smollm2-135m", 32), ("llama-3-8b", 64))
    for context, rows in ((1024, 1), (4096, 8), (4096, 32))
    for ragged in (False, True)
)
# Cases for the interpreter, which takes a second for what a GPU does at once.
SMALL = (
    Case("float16", 16, (1, 1), 5, 64, 1),
    Case("bfloat16", 64, (3, 3), 5, 333, 3, windowed=True, softcap=2.0),
)
SMALL_TIMED = (Timed("smollm2-135m", 64, 4), Timed("smollm2-135m", 64, 2, 2, ragged=True))


def first(settings: DaySettings) -> Sections:
    """Yield what matters most of the kernel."""
    kernel = _Kernel(settings)
    yield "machine", lambda: {**on_gpu(), "other_kernels": installed()}
    yield "compiling", kernel.prepare
    yield "bandwidth", lambda: measure_bandwidth(settings.device)
    yield "goal", lambda: goal(kernel.timed(settings, _goal(settings)))
    yield "checks", lambda: check_cases(kernel.of_cases(), _cases(settings, 0), 0, settings.device, settings.in_time)
    yield "graph", lambda: _only_here(settings, "capturing CUDA graphs", lambda: check_graph(kernel.compiled(), 0))
    yield (
        "commits",
        lambda: _only_here(
            settings, "the compiled copy of accepted rows", lambda: check_commits(CompiledCommit(), COMMITS, 0)
        ),
    )
    yield "batched", lambda: kernel.timed(settings, SMALL_TIMED[1:] if settings.rehearsal else BATCHED)


def more(settings: DaySettings) -> Sections:
    """Yield the rest: all shapes that are timed, and all of the grid."""
    kernel = _Kernel(settings)
    yield "bandwidth", lambda: measure_bandwidth(settings.device)
    yield "speed", lambda: kernel.timed(settings, SMALL_TIMED[:1] if settings.rehearsal else every_timed())
    yield "grid", lambda: check_cases(kernel.of_cases(), _cases(settings, 1), 1, settings.device, settings.in_time)


def every_timed() -> list[Timed]:
    """Return all shapes, in both types."""
    return [
        Timed(model, context, rows, dtype=dtype)
        for dtype in ("float16", "bfloat16")
        for model in MODELS
        for context in TIMED_CONTEXTS
        for rows in TIMED_ROWS
    ]


def _goal(settings: DaySettings) -> Sequence[Timed]:
    if settings.rehearsal:
        return SMALL_TIMED[:1]
    sizes = [(GOAL_CONTEXT, rows) for rows in GOAL_ROWS]
    return [Timed(model, *size) for size in sizes for model in ("llama-3-8b", "llama-2-7b", "smollm2-135m")]


def _cases(settings: DaySettings, part: int) -> Sequence[Case]:
    """Return the cases of a part, the first or the rest of the whole grid, drawn at random."""
    if settings.rehearsal:
        return SMALL[part : part + 1]
    every = cases(1 << 30, settings.seed)
    return every[FIRST_CASES:] if part else every[:FIRST_CASES]


def _only_here(settings: DaySettings, what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    settings.on_gpu_only(what)
    return work()


def goal(timed: dict[str, Any]) -> dict[str, Any]:
    """Return what was timed, and whether it is what was aimed at: a share of the bandwidth, and no slower than masked
    attention.
    """
    missed = [
        {name: row[name] for name in ("model", "rows", "share_of_bandwidth", "kernel_us", "torch_sdpa_us")}
        for row in timed["rows"]
        if row["share_of_bandwidth"] < GOAL_SHARE or row["kernel_us"] > row["torch_sdpa_us"]
    ]
    return {**timed, "goal_share": GOAL_SHARE, "missed": missed}


class _Kernel:
    """The kernel on the device that there is."""

    def __init__(self, settings: DaySettings) -> None:
        self._settings = settings
        self._kernel: Any = None
        self._bandwidth: float | None = None

    def prepare(self) -> dict[str, Any]:
        """Have compiled kernels for all cases; return how many were carried, and for how many there was a compiler."""
        self._settings.on_gpu_only("compiled kernels; they run in Triton's interpreter")
        self._check()
        import torch

        keys = every_key()
        folder = self._settings.kit / "kernels"
        capability = torch.cuda.get_device_capability()
        carried = held_kernels(folder, keys, capability, compile_others=False)
        held = held_kernels(folder, keys, capability)
        self._kernel = Kernel(held)
        return {"carried": len(carried), "compiled": len(held) - len(carried)}

    def compiled(self) -> Kernel:
        """Return the kernel, which is loaded where the process is a new one."""
        found: Kernel = self._here()
        return found

    def of_cases(self) -> Callable[..., Any]:
        """Return what is called with inputs and scores."""
        found: Callable[..., Any] = self._here()
        return found

    def timed(self, settings: DaySettings, chosen: Sequence[Timed]) -> dict[str, Any]:
        """Time calls, as many as there is time for."""
        kernel: PreparedKernel = self._here()
        if self._bandwidth is None:
            self._bandwidth = measure_bandwidth(settings.device)["bytes_per_second"]
        repeats = 1 if settings.rehearsal else 30
        rows: list[dict[str, Any]] = []
        for one in chosen:
            if not settings.in_time():
                break
            rows.append(time_one(kernel, one, self._bandwidth, settings.device, repeats))
        return {"rows": rows, "left_out": len(chosen) - len(rows)}

    def _here(self) -> Any:
        if self._kernel is not None:
            return self._kernel
        if self._settings.rehearsal:
            # Before Triton is imported.
            os.environ["TRITON_INTERPRET"] = "1"
            from ht_export.bench.gpu.interpreted import InterpretedKernel

            self._kernel = InterpretedKernel()
        else:
            self._check()
            import torch

            keys: list[KernelKey] = every_key()
            folder, capability = self._settings.kit / "kernels", torch.cuda.get_device_capability()
            self._kernel = Kernel(held_kernels(folder, keys, capability, compile_others=False))
        return self._kernel

    @staticmethod
    def _check() -> None:
        if missing := what_is_missing():
            raise NotHereError(missing)
        import torch

        # The launcher loads kernels into the current context, which torch makes with its first tensor.
        torch.zeros(1, device="cuda")
