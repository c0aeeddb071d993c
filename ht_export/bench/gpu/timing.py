"""Times the kernel beside torch's attention with a mask, a copy of as many bytes, and the memory's bandwidth."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ht_export.bench.gpu.cases import Case, make_inputs
from ht_export.bench.gpu.other_kernels import other_ways
from plugins.launch import Scores

TIMED_CONTEXTS = (256, 1024, 4096, 16384)
TIMED_ROWS = (1, 8, 32, 128)
# Query heads by key/value head, key/value heads, head size.
TIMED_MODELS = {"smollm2-135m": (3, 3, 64), "llama-3-8b": (4, 8, 128), "gemma-2-like": (2, 4, 256)}
# Models that are timed in other tables.
MODELS = {**TIMED_MODELS, "llama-2-7b": (1, 32, 128)}


class PreparedKernel(Protocol):
    """Tree attention of torch tensors: `ht_export.bench.gpu.compiled.Kernel`, or the interpreted one."""

    def prepare(self, inputs: dict[str, Any], scores: Scores) -> tuple[Any, Callable[[], None]]:
        """Return the output, and what computes it from `inputs` as they are then."""
        ...


def median_seconds(work: Callable[[], Any], repeats: int = 30, device: str = "cuda") -> float:
    """Return the median time of `work` on the device, on a GPU each time with a cold level-2 cache."""
    import torch

    if device == "cpu":
        spent = []
        for _ in range(1 + repeats):
            begun = time.perf_counter()
            work()
            spent.append(time.perf_counter() - begun)
        return statistics.median(spent[1:])
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


def measure_bandwidth(device: str = "cuda") -> dict[str, float]:
    """Return the bytes per second of a large copy, read and written, and of a large sum; the limit is the greater."""
    import torch

    size = min(1 << 30, torch.cuda.mem_get_info()[0] // 4) if device == "cuda" else 1 << 26
    # Numbers that are not zero: what is all alike may move faster.
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device=device)
    read = source.nbytes / median_seconds(lambda: source.sum(), device=device)
    return {"copy": copy, "read": read, "bytes_per_second": max(copy, read)}


def torch_ways(inputs: dict[str, Any], scale: float) -> dict[str, Callable[[], Any]]:
    """Return ways to have torch compute this, by name.

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
    cached = torch.arange(capacity, device=query.device) < inputs["cache_length"][:, None]
    visible = torch.cat([cached[:, None].expand(batch, rows, capacity), tree_mask], dim=-1)[:, None]

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


@dataclass(frozen=True)
class Timed:
    """A call that is timed: of `batch` requests in the shape of a model, over caches of `context` rows; `ragged`, over
    an eighth of that to all of it.
    """

    model: str
    context: int
    rows: int
    batch: int = 1
    ragged: bool = False
    dtype: str = "float16"


def time_kernel(kernel: PreparedKernel, bytes_per_second: float) -> list[dict[str, Any]]:
    """Time the kernel against torch's attention with a mask, and against reading its inputs once."""
    sizes = itertools.product(TIMED_MODELS, TIMED_CONTEXTS, TIMED_ROWS)
    return [time_one(kernel, Timed(*size), bytes_per_second) for size in sizes]


def time_one(
    kernel: PreparedKernel, timed: Timed, bytes_per_second: float, device: str = "cuda", repeats: int = 30
) -> dict[str, Any]:
    """Time one call: the kernel, torch's attention with a mask, what else is installed, and a copy that moves as many
    bytes, half of them read and half written.
    """
    import torch

    group, kv_heads, head_dim = MODELS[timed.model]
    generator = torch.Generator(device).manual_seed(0)
    case = Case(timed.dtype, head_dim, (group, kv_heads), timed.rows, timed.context, timed.batch)
    inputs = make_inputs(case, generator)
    first = timed.context // 8 if timed.ragged else timed.context
    lengths = torch.linspace(first, timed.context, timed.batch, device=device).round().long()
    inputs["cache_length"].copy_(lengths if timed.batch > 1 else timed.context)
    # All of the cache is a number.
    for cache in ("key_cache", "value_cache"):
        inputs[cache].normal_(generator=generator)

    def seconds_of(work: Callable[[], Any]) -> float:
        return median_seconds(work, repeats, device)

    _, launch = kernel.prepare(inputs, case.scores)
    seconds = seconds_of(launch)
    ways = {}
    for way, work in torch_ways(inputs, case.scores.scale).items():
        # A shape that one of torch's kernels refuses, or that takes too much memory repeated.
        with contextlib.suppress(RuntimeError):
            ways[way] = seconds_of(work) * 1e6
    others: dict[str, Any] = {}
    for way, work in other_ways(inputs, case.scores.scale).items():
        try:
            others[way] = seconds_of(work) * 1e6
        except Exception as error:
            others[way] = f"{type(error).__name__}: {error}"[:200]
    fastest = min(ways, key=lambda way: ways[way])
    columns = int(inputs["cache_length"].sum()) + timed.batch * timed.rows
    moved = 2 * head_dim * kv_heads * (2 * columns + 2 * group * timed.batch * timed.rows)
    source = torch.rand(moved // 8 + 1, device=device)
    target = torch.empty_like(source)
    limit = moved / bytes_per_second
    return {
        **asdict(timed),
        "kernel_us": seconds * 1e6,
        "torch_sdpa_us": ways[fastest],
        "torch_sdpa_way": fastest,
        "torch_sdpa_ways_us": ways,
        "others_us": others,
        "copy_us": seconds_of(lambda: target.copy_(source)) * 1e6,
        "bytes": moved,
        "bandwidth_limit_us": limit * 1e6,
        "share_of_bandwidth": limit / seconds,
    }
