"""The kernel part of `ht-bench gpu`: is tree attention right on this GPU, and how fast.

The kernels are those that plans carry: compiled ahead of time, launched through the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ht_export.bench.gpu.cases import (
    TOLERANCE,
    Case,
    cases,
    make_inputs,
    matches_definition,
    reference,
    relative_error,
)
from ht_export.bench.gpu.commits import CompiledCommit, check_commits
from ht_export.bench.gpu.compiled import Kernel
from ht_export.bench.gpu.parts import Sections, attempt, finite, note
from ht_export.bench.gpu.timing import measure_bandwidth, time_kernel
from plugins.launch import Scores

# Enough to see what is wrong; after an illegal access every further case fails too.
MOST_FAILURES = 20
COMMITS = 100


def kernel_part(count: int, seed: int) -> Sections:
    """Yield "skipped" where the kernel cannot run; else "checks", "graph", "commits", "bandwidth" and "speed"."""
    missing = what_is_missing()
    if missing:
        yield "skipped", missing
        return
    import torch

    # The launcher loads kernels into the current context, which torch makes with its first tensor.
    torch.zeros(1, device="cuda")
    kernel = Kernel()
    yield "checks", attempt(lambda: check_kernel(kernel, count, seed))
    yield "graph", attempt(lambda: check_graph(kernel, seed))
    yield "commits", attempt(lambda: check_commits(CompiledCommit(), COMMITS, seed))
    note("timing the kernel")
    yield "bandwidth", (bandwidth := attempt(measure_bandwidth))
    yield "speed", attempt(lambda: {"rows": time_kernel(kernel, bandwidth["bytes_per_second"])})


def what_is_missing() -> str | None:
    """Return what keeps the kernel from running here, or None."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if not torch.cuda.is_available():
        return "torch sees no GPU" if torch.version.cuda else "this torch is for the CPU only"
    try:
        import triton  # noqa: F401
        from cuda.bindings import driver  # noqa: F401
    except ImportError as error:
        return f"{error}; pip install triton cuda-bindings"
    from plugins.binaries import ARCHITECTURES, best_architecture

    major, minor = torch.cuda.get_device_capability()
    if best_architecture(major, minor, ARCHITECTURES) is None:
        return f"there is no kernel for compute capability {major}.{minor}"
    return None


def check_kernel(
    kernel: Callable[[dict[str, Any], Scores], Any], count: int, seed: int, device: str = "cuda"
) -> dict[str, Any]:
    """Compare the kernel with the reference over `count` cases of the grid; see `check_cases`."""
    return check_cases(kernel, cases(count, seed), seed, device)


def check_cases(
    kernel: Callable[[dict[str, Any], Scores], Any],
    chosen: Sequence[Case],
    seed: int,
    device: str = "cuda",
    in_time: Callable[[], bool] = lambda: True,
) -> dict[str, Any]:
    """Compare the kernel with the reference; return the worst error by type, every case beyond its tolerance, and how
    many cases were `left_out` because it was too late for them.
    """
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    worst = dict.fromkeys(TOLERANCE, 0.0)
    failures: list[dict[str, Any]] = []
    checked = 0
    for case in chosen:
        if not in_time() or len(failures) == MOST_FAILURES:
            break
        checked += 1
        if checked % 200 == 0:
            note(f"checked {checked} of {len(chosen)} cases of the kernel")
        inputs = make_inputs(case, generator)
        expected = reference(inputs, case.scores)
        if checked % 50 == 1 and case.rows * case.capacity < 40000:
            assert matches_definition(inputs, case.scores, expected), (
                f"torch's attention is wrong in float64 for {case}"
            )
        try:
            error = relative_error(kernel(inputs, case.scores), expected)
        except (RuntimeError, ValueError) as raised:
            failures.append({**asdict(case), "raised": str(raised)[:300]})
        else:
            worst[case.dtype] = max(worst[case.dtype], error)
            # Not a number must not pass as small.
            if not error <= TOLERANCE[case.dtype]:
                failures.append({**asdict(case), "error": finite(error)})
    faults = [f"{len(failures)} of {checked} cases are wrong, the first {failures[0]}"] if failures else []
    return {
        "cases": checked,
        "left_out": len(chosen) - checked,
        "worst_error": worst,
        "tolerance": TOLERANCE,
        "failures": failures,
        "faults": faults,
    }


def check_graph(kernel: Kernel, seed: int) -> dict[str, Any]:
    """Check that a launch captured in a CUDA graph follows its inputs, the length of the cache above all."""
    import torch

    generator = torch.Generator("cuda").manual_seed(seed)
    case = Case("float16", 64, (3, 3), 8, 2048, 2)
    inputs = make_inputs(case, generator)
    output, launch = kernel.prepare(inputs, case.scores)
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for name, value in make_inputs(case, generator).items():
        inputs[name].copy_(value)
    output.fill_(torch.nan)
    graph.replay()
    error = relative_error(output, reference(inputs, case.scores))
    fault = f"a captured launch is wrong by {error:.1e} after its inputs changed"
    return {"worst_error": finite(error), "faults": [] if error <= TOLERANCE[case.dtype] else [fault]}
