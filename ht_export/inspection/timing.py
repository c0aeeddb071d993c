"""Where the time of a pass goes, as ONNX Runtime's profiler tells it."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ht_export.inspection.describe import read_graph
from ht_export.inspection.parts import OTHER, parts_of_nodes
from runtime import bindings
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import EngineFile
from runtime.engines.layout import stack
from runtime.engines.onnxruntime import running
from runtime.engines.packing import nobodys_rows
from runtime.errors import InputError
from runtime.rows import Rows, lay_out
from runtime.tree import TreeSizes, chain

# Tokens of context that a pass is timed behind; passes, and those before that are not counted.
CONTEXT, PASSES, WARM_UP = 128, 10, 3


@dataclass(frozen=True)
class _Event:
    """An event of a profile; times in microseconds."""

    name: str
    category: str
    start: int
    duration: int
    operator: str

    @property
    def end(self) -> int:
        return self.start + self.duration


@dataclass(frozen=True)
class Timing:
    """A pass of `rows` rows behind `context` tokens: milliseconds of its nodes, in all, by part and by operator."""

    graph: str
    rows: int
    context: int
    passes: int
    milliseconds: float
    parts: dict[str, float]
    operators: dict[str, float]


def time_passes(engine: Path, about: EngineFile, threads: int | None = None) -> Timing:
    """Run passes of the engine's own tree on the CPU, of the graph that is lowered for it where there is one.

    Raises `InputError` for a plan, and for a graph that the CPU does not run.
    """
    if about.plan:
        raise InputError(f"{engine} is a plan; --time is for ONNX engines: measure a plan on its GPU with ht-bench")
    import onnxruntime

    record = about.cpu_graph or about.graph
    graph = read_graph(engine, record)
    path = record.open(engine, contents=False)
    path.close()
    # The top level only: an event of a node that chooses has those of its branches within it.
    parts = parts_of_nodes(graph)
    rows = _rows(about.tree, about.dims)
    with tempfile.TemporaryDirectory() as folder, running(engine):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        if threads is not None:
            options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path.name, options, providers=["CPUExecutionProvider"])
        binding = _bound(session, about.dims, rows, lowered=about.cpu_graph is not None)
        for _ in range(WARM_UP + PASSES):
            session.run_with_iobinding(binding)
        events = _events(Path(session.end_profiling()))
    by_part: dict[str, float] = defaultdict(float)
    by_operator: dict[str, float] = defaultdict(float)
    for event in _nodes(_of_last_passes(events)):
        milliseconds = event.duration / 1e3 / PASSES
        by_part[parts.get(event.name.removesuffix("_kernel_time"), OTHER)] += milliseconds
        by_operator[event.operator] += milliseconds
    return Timing(
        record.name,
        len(rows.position_ids),
        CONTEXT,
        PASSES,
        sum(by_part.values()),
        _sorted(by_part),
        _sorted(by_operator),
    )


def _rows(tree: TreeSizes, dims: GraphDims) -> Rows:
    """Return the rows of a pass of these sizes; what its tokens are does not change its time."""
    ends = tuple(np.arange(count, dtype=np.int64) for count in tree.pseudo_rows)
    return lay_out(chain([0] * tree.tree_rows), ends, dims.join_order, CONTEXT)


def _bound(session: Any, dims: GraphDims, rows: Rows, *, lowered: bool) -> Any:
    """Return the inputs and outputs of a pass of one request, bound as an engine binds them."""
    feed: dict[str, Any] = dict(stack([rows], [CONTEXT], dims.join_order).values)
    names = {one.name for one in session.get_inputs()}
    if bindings.SLOT_ROWS in names:
        feed |= nobodys_rows(1)
    dtype = {"float32": np.float32, "float16": np.float16}.get(dims.dtype)
    if dtype is None:
        raise InputError(f"an engine in {dims.dtype} does not run on the CPU; --time is for those that do")
    room = len(rows.position_ids) if lowered else 0
    shape = (1, dims.key_value_heads, CONTEXT + room, dims.head_dim)
    binding = session.io_binding()
    for layer in range(dims.num_layers):
        for into, out in (
            (bindings.key_cache(layer), bindings.key_cache_out(layer)),
            (bindings.value_cache(layer), bindings.value_cache_out(layer)),
        ):
            feed[into] = np.full(shape, 0.01, dtype=dtype)
            if lowered:
                # Where it is, as in the engine.
                binding.bind_output(out, "cpu", 0, dtype, shape, feed[into].ctypes.data)
    feed = {name: np.ascontiguousarray(value) for name, value in feed.items() if name in names}
    for name, value in feed.items():
        binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
    for output in session.get_outputs():
        if not lowered or output.name in (bindings.LOGITS, bindings.DRAFT_LOGITS):
            binding.bind_output(output.name, "cpu")
    # Bound by address.
    binding.held = feed
    return binding


def _events(profile: Path) -> list[_Event]:
    """Return the events of a profile that a session has written a moment before."""
    return [
        _Event(one["name"], one["cat"], one["ts"], one["dur"], one.get("args", {}).get("op_name", one["name"]))
        for one in json.loads(profile.read_text(encoding="utf-8"))
        if "dur" in one
    ]


def _of_last_passes(events: Sequence[_Event]) -> list[_Event]:
    """Return the events of the passes that count."""
    start = sorted(event.start for event in events if event.name == "model_run")[-PASSES]
    return [event for event in events if event.start >= start]


def _nodes(events: Sequence[_Event]) -> Iterator[_Event]:
    """Yield the times of nodes but those within another: a node that chooses spans those of its branches."""
    end = 0
    nodes = [event for event in events if event.category == "Node" and event.name.endswith("_kernel_time")]
    for event in sorted(nodes, key=lambda event: (event.start, -event.duration)):
        if event.end > end:
            yield event
            end = event.end


def _sorted(times: dict[str, float]) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: -item[1]))
