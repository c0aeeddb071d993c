"""Times the kernel beside torch's attention with a mask and the memory's bandwidth."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable
from typing import Any

from ht_export.bench.gpu.cases import Case, make_inputs
from ht_export.bench.gpu.compiled import Kernel

TIMED_CONTEXTS = (256, 1024, 4096, 16384)
TIMED_ROWS = (1, 8, 32, 128)
# Query heads by key/value head, key/value heads, head size.
TIMED_MODELS = {"smollm2-135m": (3, 3, 64), "llama-3-8b": (4, 8, 128), "gemma-2-like": (2, 4, 256)}


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
