"""How long a pass takes over rows, requests and context, for models of any shape: nothing but torch and the kernel.

Passes are replayed as CUDA graphs, so that their time is the GPU's; what the host does in a step is timed apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ht_export.bench.gpu.llama import Llama, Outputs, Shape

# A pass of so many times a plain one's time is as good as free: the most rows of which that holds are the knee.
FREE = 1.15
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
REQUESTS = (2, 4, 8, 16, 32, 64)
USUAL_CONTEXT = 1024
# Of the memory that is free, the share that keys and values may take.
SHARE = 0.8
ALIGNMENT = 64


@dataclass(frozen=True)
class Point:
    """A pass that is timed: so many requests, tree rows of each, pseudo rows of each draft step, rows in the cache."""

    requests: int
    tree_rows: int
    pseudo_rows: int
    context: int


def points() -> list[Point]:
    """Return the passes to time, those that tell the most first."""
    found = [Point(1, rows, 0, USUAL_CONTEXT) for rows in ROWS]
    found += [Point(1, rows, rows, USUAL_CONTEXT) for rows in ROWS[:-2]]
    found += [Point(1, rows, 0, context) for context in (8192, 64) for rows in (1, 16, 64)]
    found += [Point(count, rows, 0, USUAL_CONTEXT) for count in REQUESTS for rows in (1, 4, 16)]
    found += [Point(count, 4, 4, USUAL_CONTEXT) for count in REQUESTS]
    found += [Point(count, rows, 0, context) for context in (64, 8192) for count in (16, 64) for rows in (1, 4)]
    return found


def time_points(
    model: Llama, chosen: Sequence[Point], device: str, in_time: Callable[[], bool], bytes_per_second: float | None
) -> dict[str, Any]:
    """Time the passes; return them, those left out for want of memory or time, what they say, and the time that reading
    the weights once takes at `bytes_per_second`.
    """
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for point in chosen:
        if not in_time():
            left_out.append({**asdict(point), "why": "time"})
        elif not _fits(model.shape, point, model.weights.embed.element_size(), device):
            left_out.append({**asdict(point), "why": "memory"})
        else:
            # Its memory is free before the next one's is taken.
            rows.append({**asdict(point), "ms": 1e3 * seconds_of(prepared(model, point, device), device)})
    bytes_read = model.shape.read_weights * model.weights.embed.element_size()
    limit = None if bytes_per_second is None else 1e3 * bytes_read / bytes_per_second
    return {
        "weight_bytes": bytes_read,
        "weight_limit_ms": limit,
        "rows": rows,
        "left_out": left_out,
        "summary": summary(rows, len(model.shape.transfer_layers), limit),
    }


def summary(rows: Sequence[dict[str, Any]], steps: int, limit_ms: float | None) -> dict[str, Any]:
    """Return, for one request at the usual context: the knee, the time of 64 rows over one's, the microseconds that a
    further tree row and a pseudo row add at 16, and how many times the weight-reading limit a plain pass takes.
    """
    ms = {(row["tree_rows"], row["pseudo_rows"]): row["ms"] for row in rows if _is_usual(row)}
    plain = {tree: found for (tree, pseudo), found in ms.items() if not pseudo}
    if 1 not in plain:
        return {}
    free = [tree for tree, found in sorted(plain.items()) if found <= FREE * plain[1]]
    told: dict[str, Any] = {"plain_ms": plain[1], "knee_rows": free[-1]}
    if 64 in plain:
        told["rows_64_over_1"] = plain[64] / plain[1]
    if 16 in plain and 32 in plain:
        told["tree_row_us"] = 1e3 * (plain[32] - plain[16]) / 16
    if (16, 16) in ms and 16 in plain:
        told["pseudo_row_us"] = 1e3 * (ms[16, 16] - plain[16]) / (16 * steps)
    if limit_ms:
        told["plain_over_weight_limit"] = plain[1] / limit_ms
    return told


def host_time(model: Llama, point: Point, device: str, repeats: int = 50) -> dict[str, Any]:
    """Return what a step takes in all, its inputs sent and its choices fetched, and what the pass alone takes: the
    difference is what the host adds, of this way of running it.
    """
    import torch

    pinned = device == "cuda"
    work = prepared(model, point, device)
    replay = captured(work.run) if device == "cuda" else work.run
    sent = [tensor.cpu().pin_memory() if pinned else tensor.clone() for tensor in work.inputs]
    fetched = torch.empty_like(work.chosen, device="cpu", pin_memory=pinned)

    def step() -> None:
        for tensor, source in zip(work.inputs, sent, strict=True):
            tensor.copy_(source, non_blocking=True)
        replay()
        fetched.copy_(work.chosen, non_blocking=True)
        if pinned:
            torch.cuda.synchronize()

    def launch() -> None:
        for tensor, source in zip(work.inputs, sent, strict=True):
            tensor.copy_(source, non_blocking=True)
        replay()
        fetched.copy_(work.chosen, non_blocking=True)

    whole = _wall(step, repeats)
    # Enqueued and not waited for: what the host itself is busy with.
    enqueue = _wall(launch, repeats, after=torch.cuda.synchronize if pinned else lambda: None)
    alone = seconds_of(work, device)
    return {
        **asdict(point),
        "step_ms": 1e3 * whole,
        "pass_ms": 1e3 * alone,
        "host_adds_us": 1e6 * (whole - alone),
        "enqueue_us": 1e6 * enqueue,
    }


@dataclass(frozen=True)
class Prepared:
    """A pass with its memory: `run` computes it, `inputs` are what a step sends, `chosen` what it fetches."""

    run: Callable[[], None]
    inputs: list[Any]
    chosen: Any


def prepared(model: Llama, point: Point, device: str) -> Prepared:
    """Return a pass over caches of random numbers, that chooses the best token of every row."""
    import torch

    shape, dtype = model.shape, model.weights.embed.dtype
    batch, tree, steps = point.requests, point.tree_rows, len(shape.transfer_layers)
    rows = tree + steps * point.pseudo_rows
    capacity = -(-(point.context + tree) // ALIGNMENT) * ALIGNMENT
    generator = torch.Generator(device).manual_seed(0)

    def cache() -> Any:
        size = (batch, shape.kv_heads, capacity, shape.head_dim)
        return torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)

    caches = [(cache(), cache()) for _ in range(shape.layers)]
    ids = torch.randint(shape.vocab, (batch, tree), generator=generator, device=device)
    positions = (point.context + torch.arange(rows, device=device)).repeat(batch, 1)
    # What rows see takes the kernel no other time: a chain.
    mask = torch.ones(batch, rows, rows, dtype=torch.bool, device=device).tril_()
    parents = [torch.arange(point.pseudo_rows, device=device).repeat(batch, 1) for _ in range(steps)]
    logit_rows = torch.arange(tree, device=device).repeat(batch, 1)
    lengths = torch.full((batch,), point.context, device=device)
    chosen = torch.zeros(batch, tree + steps * point.pseudo_rows, dtype=torch.int64, device=device)
    keys, values = [key for key, _ in caches], [value for _, value in caches]

    def run() -> None:
        with torch.no_grad():
            found: Outputs = model(ids, positions, mask, parents, logit_rows, lengths, keys, values)
            chosen.copy_(torch.cat([found.logits.argmax(-1), found.draft_logits.argmax(-1)], dim=1))

    return Prepared(run, [ids, positions, mask, lengths], chosen)


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of `run`."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds_of(work: Prepared, device: str) -> float:
    """Return the median time of a pass, on a GPU of its graph, several times one after the other."""
    if device == "cpu":
        return _wall(work.run, 2)
    import torch

    replay = captured(work.run)
    replay()
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 5e3)
    return statistics.median(times)


def _wall(work: Callable[[], None], repeats: int, after: Callable[[], Any] = lambda: None) -> float:
    times = []
    for _ in range(1 + repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
        after()
    return statistics.median(times[1:])


def _fits(shape: Shape, point: Point, item: int, device: str) -> bool:
    rows = point.requests * (point.context + point.tree_rows + ALIGNMENT)
    needed = rows * shape.row_bytes(item)
    # States of all rows, and logits, which are the widest.
    passed = point.requests * (point.tree_rows + 3 * point.pseudo_rows)
    needed += passed * (shape.vocab * item * 2 + 8 * shape.intermediate * item)
    return needed <= SHARE * _free(device)


def _free(device: str) -> int:
    if device == "cpu":
        return 1 << 32
    import torch

    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def _is_usual(row: dict[str, Any]) -> bool:
    return row["requests"] == 1 and row["context"] == USUAL_CONTEXT


def tables(found: dict[str, Any]) -> Iterator[str]:
    """Yield what `time_points` found as lines of Markdown."""
    yield "| requests | context | tree rows | pseudo rows a step | ms |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for row in found["rows"]:
        yield (
            f"| {row['requests']} | {row['context']} | {row['tree_rows']} | {row['pseudo_rows']} | {row['ms']:.3f} |"
        )
