"""The kernel part of `gpu_check.py`: is tree attention right on this GPU, and how fast.

The kernels are those that plans carry: compiled ahead of time, launched through the driver.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ht_export.bench.gpu.parts import Sections, attempt, finite, note
from plugins.binaries import Form
from plugins.launch import Scores

# Of a row's largest output. Rounding alone, emulated on the CPU over these shapes, makes at most 9e-4 and 7e-3; a cache
# read one row short makes 7e-3 or more in float16, at the longest contexts too.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}
GRID: dict[str, tuple[Any, ...]] = {
    "dtype": ("float16", "bfloat16"),
    "head_dim": (16, 64, 80, 96, 128, 256),
    "heads": ((1, 1), (3, 3), (4, 2), (8, 1), (1, 4)),
    "rows": (1, 5, 16, 33, 256),
    "capacity": (0, 1, 64, 333, 2048, 5000),
    "batch": (1, 3),
    "windowed": (False, True),
    # Low enough that scores come near it.
    "softcap": (0.0, 2.0),
}
# Enough to see what is wrong; after an illegal access every further case fails too.
MOST_FAILURES = 20
TIMED_CONTEXTS = (256, 1024, 4096, 16384)
TIMED_ROWS = (1, 8, 32, 128)
# Query heads by key/value head, key/value heads, head size.
TIMED_MODELS = {"smollm2-135m": (3, 3, 64), "llama-3-8b": (4, 8, 128), "gemma-2-like": (2, 4, 256)}


@dataclass(frozen=True)
class Case:
    """One call: `heads` are query heads by key/value head, and key/value heads."""

    dtype: str
    head_dim: int
    heads: tuple[int, int]
    rows: int
    capacity: int
    batch: int
    windowed: bool = False
    softcap: float = 0.0

    @property
    def scores(self) -> Scores:
        """What becomes of its products."""
        return Scores(self.head_dim**-0.5, self.softcap)


def kernel_part(count: int, seed: int) -> Sections:
    """Yield "skipped" where the kernel cannot run; else "checks", "graph", "bandwidth" and "speed"."""
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


class Kernel:
    """The compiled kernels for this GPU, called with torch tensors."""

    def __init__(self) -> None:
        self._launchers: dict[tuple[str, int, Form], Any] = {}

    def __call__(self, inputs: dict[str, Any], scores: Scores) -> Any:
        """Return the output for the inputs of `make_inputs`."""
        output, launch = self.prepare(inputs, scores)
        launch()
        return output

    def prepare(self, inputs: dict[str, Any], scores: Scores) -> tuple[Any, Callable[[], None]]:
        """Return the output, and what computes it from `inputs` as they are then, on torch's stream."""
        import torch

        from plugins.launch import Buffers, Shapes, workspace_size

        query, cache = inputs["query"], inputs["key_cache"]
        batch, query_heads, rows, head_dim = query.shape
        shapes = Shapes(batch, query_heads, cache.shape[1], rows, cache.shape[2], head_dim)
        form = Form("first_visible" in inputs, bool(scores.softcap))
        launcher = self._launcher(str(query.dtype).removeprefix("torch."), head_dim, form)
        # Not a number, so that what is not written shows.
        workspace = torch.full((workspace_size(shapes, launcher.multiprocessors) // 4,), torch.nan, device=query.device)
        output = torch.full_like(query, torch.nan)

        def launch() -> None:
            addresses = {name: tensor.data_ptr() for name, tensor in inputs.items()}
            buffers = Buffers(**addresses, output=output.data_ptr())
            launcher(shapes, buffers, workspace.data_ptr(), scores, torch.cuda.current_stream().cuda_stream)

        return output, launch

    def _launcher(self, dtype: str, head_dim: int, form: Form) -> Any:
        import torch

        from plugins.binaries import ARCHITECTURES, KernelBinaries, best_architecture
        from plugins.compile import compile_kernels
        from plugins.launch import Launcher

        key = (dtype, head_dim, form)
        if key not in self._launchers:
            note(f"compiling the kernels for {dtype}, head size {head_dim}, {form}")
            sm = best_architecture(*torch.cuda.get_device_capability(), ARCHITECTURES)
            assert sm is not None
            binaries = compile_kernels(dtype, head_dim, [sm], forms=[form])
            self._launchers[key] = Launcher(KernelBinaries.from_bytes(binaries.to_bytes()))
        return self._launchers[key]


def make_inputs(case: Case, generator: Any) -> dict[str, Any]:
    """Return random inputs; what lies behind the valid rows of the cache is not a number."""
    import torch

    device = generator.device
    dtype = getattr(torch, case.dtype)
    group, kv_heads = case.heads

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    lengths = torch.randint(0, case.capacity + 1, (case.batch,), generator=generator, device=device)
    # Where there are several, one fills the cache.
    lengths[1:2] = case.capacity
    shape = (case.batch, kv_heads, case.capacity, case.head_dim)
    keys, values = normal(*shape), normal(*shape)
    behind = torch.arange(case.capacity, device=device) >= lengths[:, None]
    for cache in (keys, values):
        cache.masked_fill_(behind[:, None, :, None], torch.nan)
    mask = torch.rand(case.batch, case.rows, case.rows, generator=generator, device=device) < 0.5
    window = {}
    if case.windowed:
        # Some rows see all of the cache, some a part, some nothing.
        first = torch.randint(-9, case.capacity + 9, (case.batch, case.rows), generator=generator, device=device)
        window["first_visible"] = first
    return {
        "query": normal(case.batch, group * kv_heads, case.rows, case.head_dim),
        "key_new": normal(case.batch, kv_heads, case.rows, case.head_dim),
        "value_new": normal(case.batch, kv_heads, case.rows, case.head_dim),
        "key_cache": keys,
        "value_cache": values,
        "cache_length": lengths,
        "tree_mask": mask.tril() | torch.eye(case.rows, dtype=torch.bool, device=device),
        **window,
    }


def reference(inputs: dict[str, Any], scores: Scores) -> Any:
    """Return what `plugins.reference.tree_attention` defines, computed by torch in float64 where the inputs are."""
    import torch

    batch, _, rows, _ = inputs["query"].shape
    capacity = inputs["key_cache"].shape[2]
    lengths = inputs["cache_length"]
    slots = torch.arange(capacity, device=lengths.device)
    cached = (slots < lengths[:, None])[:, None, :].expand(batch, rows, capacity)
    if "first_visible" in inputs:
        cached = cached & (slots >= inputs["first_visible"][..., None])
    visible = torch.cat([cached, inputs["tree_mask"]], dim=-1)[:, None]

    def joined(cache: str, new: str) -> Any:
        return torch.cat([inputs[cache].double().nan_to_num(), inputs[new].double()], dim=2)

    keys, values = joined("key_cache", "key_new"), joined("value_cache", "value_new")
    query = inputs["query"].double()
    if not scores.softcap:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, scale=scores.scale, enable_gqa=True
        )
    group = query.shape[1] // keys.shape[1]
    capped = query @ keys.repeat_interleave(group, dim=1).transpose(2, 3) * (scores.scale / scores.softcap)
    weights = (capped.tanh() * scores.softcap).masked_fill(~visible, -torch.inf).softmax(-1)
    return weights @ values.repeat_interleave(group, dim=1)


def cases(count: int, seed: int) -> list[Case]:
    """Return `count` cases of the grid, or all of it, drawn at random: a regular draw would leave whole values out."""
    every = [Case(*values) for values in itertools.product(*GRID.values())]
    return random.Random(seed).sample(every, min(count, len(every)))


def relative_error(found: Any, expected: Any) -> float:
    """Return the largest difference in any row of attention, relative to the row's largest value."""
    difference = (found.double() - expected).abs()
    return float((difference / expected.abs().amax(dim=-1, keepdim=True)).max())


def check_kernel(
    kernel: Callable[[dict[str, Any], Scores], Any], count: int, seed: int, device: str = "cuda"
) -> dict[str, Any]:
    """Compare the kernel with the reference; return the worst error by type, and every case beyond its tolerance."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    worst = dict.fromkeys(TOLERANCE, 0.0)
    failures: list[dict[str, Any]] = []
    chosen = cases(count, seed)
    checked = 0
    for checked, case in enumerate(chosen, start=1):
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
        if len(failures) == MOST_FAILURES:
            break
    faults = [f"{len(failures)} of {checked} cases are wrong, the first {failures[0]}"] if failures else []
    return {"cases": checked, "worst_error": worst, "tolerance": TOLERANCE, "failures": failures, "faults": faults}


def matches_definition(inputs: dict[str, Any], scores: Scores, expected: Any) -> bool:
    """Return whether the definition in numpy gives `expected`."""
    import numpy as np

    from plugins.reference import tree_attention

    arrays = {
        name: (tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy()
        for name, tensor in inputs.items()
    }
    found = tree_attention(**arrays, scale=scores.scale, softcap=scores.softcap)
    return bool(np.allclose(found, expected.cpu().numpy(), rtol=0, atol=1e-9))


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


def median_seconds(work: Callable[[], Any], repeats: int = 30) -> float:
    """Return the median time of `work` on the device, each time with a cold level-2 cache."""
    import torch

    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        work()
    times: list[float] = []
    flushes = 4
    while len(times) < repeats:
        for _ in range(flushes):
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        # Reached already, it would count the time that the host took to launch the work.
        host_was_late = start.query()
        end.record()
        end.synchronize()
        if host_was_late and flushes < 256:
            flushes *= 2
        else:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure_bandwidth() -> dict[str, float]:
    """Return the bytes per second of a large copy, read and written, and of a large sum; the limit is the greater."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    source = torch.zeros(min(1 << 30, free // 4) // 4, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_seconds(lambda: target.copy_(source))
    read = source.nbytes / median_seconds(lambda: source.sum())
    return {"copy": copy, "read": read, "bytes_per_second": max(copy, read)}


def torch_ways(inputs: dict[str, Any], scale: float) -> dict[str, Callable[[], Any]]:
    """Return ways to have torch compute this over a full cache, by name.

    Which of its kernels runs depends on how it is asked: those for a mask know no groups of heads. Joining the keys and
    values, repeating them and making the mask are not timed, in torch's favour.
    """
    import torch

    attention = torch.nn.functional.scaled_dot_product_attention
    query, tree_mask = inputs["query"], inputs["tree_mask"]
    batch, query_heads, rows, head_dim = query.shape
    kv_heads, capacity = inputs["key_cache"].shape[1:3]
    group = query_heads // kv_heads
    keys = torch.cat([inputs["key_cache"], inputs["key_new"]], dim=2)
    values = torch.cat([inputs["value_cache"], inputs["value_new"]], dim=2)
    visible = torch.cat([tree_mask.new_ones(batch, rows, capacity), tree_mask], dim=-1)[:, None]

    def added(visible: Any) -> Any:
        """Return the mask as numbers to add, with rows aligned as the fused kernels want them."""
        columns = visible.shape[-1]
        wide = query.new_full((*visible.shape[:-1], -(-columns // 16) * 16), -torch.inf)
        return wide[..., :columns].masked_fill_(visible, 0.0)

    mask, packed_mask = added(visible), added(visible.repeat(1, 1, group, 1))
    packed = query.reshape(batch, kv_heads, group * rows, head_dim)
    more_keys, more_values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    return {
        "as it is": lambda: attention(query, keys, values, attn_mask=visible, scale=scale, enable_gqa=True),
        "keys repeated": lambda: attention(query, more_keys, more_values, attn_mask=mask, scale=scale),
        "heads packed": lambda: attention(packed, keys, values, attn_mask=packed_mask, scale=scale),
    }


def time_kernel(kernel: Kernel, bytes_per_second: float) -> list[dict[str, Any]]:
    """Time the kernel against torch's attention with a mask, and against reading its inputs once."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    rows = []
    for (name, heads_and_size), context, count in itertools.product(TIMED_MODELS.items(), TIMED_CONTEXTS, TIMED_ROWS):
        group, kv_heads, head_dim = heads_and_size
        case = Case("float16", head_dim, (group, kv_heads), count, context, 1)
        inputs = make_inputs(case, generator)
        # All of the cache is valid, and all of it a number.
        inputs["cache_length"].fill_(context)
        for cache in ("key_cache", "value_cache"):
            inputs[cache].normal_(generator=generator)
        _, launch = kernel.prepare(inputs, case.scores)
        seconds = median_seconds(launch)
        ways = {}
        for way, work in torch_ways(inputs, case.scores.scale).items():
            # A shape that one of torch's kernels refuses, or that takes too much memory repeated.
            with contextlib.suppress(RuntimeError):
                ways[way] = median_seconds(work) * 1e6
        fastest = min(ways, key=lambda way: ways[way])
        limit = 2 * head_dim * kv_heads * (2 * (context + count) + 2 * group * count) / bytes_per_second
        rows.append(
            {
                "model": name,
                "context": context,
                "rows": count,
                "kernel_us": seconds * 1e6,
                "torch_sdpa_us": ways[fastest],
                "torch_sdpa_way": fastest,
                "torch_sdpa_ways_us": ways,
                "bandwidth_limit_us": limit * 1e6,
                "share_of_bandwidth": limit / seconds,
            }
        )
    return rows
