"""A portable graph and the lowered one made of it, with the same rows in the caches of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ht_export.graph.lower_cpu import lower_for_cpu
from ht_export.graph.trace import build_graph
from ht_export.model.dims import graph_dims
from ht_export.model.reference import HiddenTransferModel
from runtime.bindings import GraphDims
from runtime.engines import dense_cache
from runtime.engines.dense_cache import DenseCache, KeptRows
from runtime.engines.host_cache import HostResult, KeyValueCache
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.engines.onnxruntime_cpu import InPlaceResult, OnnxRuntimeCpuEngine
from runtime.engines.places import PlacedSlot
from runtime.engines.protocol import Batch
from runtime.rows import Rows
from runtime.tree import Tree
from tests.conftest import random_transfer
from tests.passes import run_one
from tests.strategies import trees


@dataclass(frozen=True)
class Graphs:
    """A portable graph and the lowered one beside it, each with an engine."""

    portable: OnnxRuntimeEngine
    lowered: OnnxRuntimeCpuEngine
    path: Path

    @classmethod
    def open(cls, portable: Path, lowered: Path, dims: GraphDims) -> Graphs:
        return cls(
            OnnxRuntimeEngine(portable, dims, threads=1), OnnxRuntimeCpuEngine(lowered, dims, threads=1), lowered
        )

    @property
    def dims(self) -> GraphDims:
        return self.portable.dims

    def load(self) -> onnx.ModelProto:
        """Return the lowered graph without its weights."""
        return onnx.load(self.path, load_external_data=False)


def trace(base: PreTrainedModel, layers: tuple[int, ...], folder: Path) -> tuple[Path, GraphDims]:
    """Write the portable graph of `base` with transfer `layers`; return its path and dimensions."""
    model = HiddenTransferModel(base, random_transfer(layers, base.config.hidden_size)).eval()
    path = folder / "engine.onnx"
    ir.save(build_graph(model), path, external_data="engine.onnx.data")
    return path, graph_dims(model.base.config, model.transfer)


def lower(path: Path, dims: GraphDims) -> Path:
    model = ir.load(path)
    lower_for_cpu(model, dims)
    lowered = path.with_name("engine.cpu.onnx")
    ir.save(model, lowered)
    return lowered


@st.composite
def passes(draw: st.DrawFn, steps: int) -> tuple[Tree, tuple[np.ndarray, ...], np.ndarray, int, int]:
    """Any tree, its pseudo rows' parents by step, the rows whose logits are wanted, cached rows and room to spare."""
    tree = draw(trees(max_rows=9))
    some = st.lists(st.integers(0, len(tree) - 1), unique=True).map(lambda rows: np.array(sorted(rows), dtype=np.int64))
    pseudo_parents = tuple(draw(some) for _ in range(steps))
    return tree, pseudo_parents, draw(some), draw(st.integers(0, 20)), draw(st.integers(0, 20))


def assert_close(found: Any, expected: Any, name: str) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4, err_msg=name, strict=True)


@dataclass(frozen=True)
class Requests:
    """Requests with a slot in each engine; `before` are the rows [2, L, Hkv, S, D] of all as they began, the lowered
    engine's valid ones and those behind them.
    """

    graphs: Graphs
    cache: DenseCache
    caches: list[KeyValueCache]
    slots: list[PlacedSlot]
    before: list[NDArray[np.float32]]

    def portable(self, index: int, rows: Rows) -> HostResult:
        """Return the pass of one request alone in the portable graph."""
        return run_one(self.graphs.portable, rows, self.caches[index])

    def lowered(self, chosen: Sequence[int], rows: Sequence[Rows]) -> InPlaceResult:
        """Return the pass of the requests `chosen` together in the lowered graph."""
        return self.graphs.lowered.run(Batch.of(rows, [self.slots[index] for index in chosen]))

    def assert_untouched(self, ran: Sequence[int], rows: int) -> None:
        """Check that valid rows are as they were, and what lies behind the `rows` new ones of those that `ran`."""
        for index, (slot, before) in enumerate(zip(self.slots, self.before, strict=True)):
            found, length = self.cache.of(slot), self.caches[index].length
            np.testing.assert_array_equal(found[..., :length, :], before[..., :length, :])
            if index in ran:
                end = length + rows
                np.testing.assert_array_equal(found[..., end : before.shape[3], :], before[..., end:, :])


@contextmanager
def requests_of(graphs: Graphs, lengths: Sequence[int], room: int, behind: float, seed: int = 0) -> Iterator[Requests]:
    """Yield a request for each of `lengths`, with that many random rows. In the lowered engine they are the only ones,
    and `behind` is written in the `room` rows behind those of the longest, and in all that are not valid.
    """
    rng = np.random.default_rng(seed)
    dims = graphs.dims
    cache = DenseCache(dims)
    with mock.patch.object(graphs.lowered, "_cache", cache), mock.patch.object(dense_cache, "BLOCK", 1):
        caches, slots = [], []
        for length in lengths:
            shape = (2, dims.num_layers, dims.key_value_heads, length, dims.head_dim)
            rows = rng.standard_normal(shape).astype(np.float32)
            copied = KeyValueCache(dims)
            copied.keys, copied.values = (kind[:, None] for kind in rows)
            copied.length = length
            caches.append(copied)
            slots.append(graphs.lowered.new_slot())
            graphs.lowered.copy(KeptRows(rows), slots[-1], length)
        cache.reserve(max(lengths), room)
        for slot in slots:
            cache.of(slot)[..., slot.length :, :] = behind
        yield Requests(graphs, cache, caches, slots, [cache.of(slot).copy() for slot in slots])
