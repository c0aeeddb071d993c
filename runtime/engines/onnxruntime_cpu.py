"""The graph lowered for ONNX Runtime on the CPU, which writes new keys and values into the cache where it is.

A pass copies nothing that it does not compute: the cache is bound once as input and as output, its valid rows are read
in place, and logits go into buffers that are used again. Rows behind the valid ones are left by passes before and never
read; committing moves the accepted ones among them together.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime import bindings
from runtime.bindings import GraphDims, dynamic_dims
from runtime.engines.external_weights import GraphFiles
from runtime.engines.host_cache import MANY
from runtime.engines.layout import stack
from runtime.engines.onnxruntime import open_session, path_of, running
from runtime.engines.protocol import Batch, Freshness, Result, Slot
from runtime.rows import HostOutputs

BLOCK = 256


class InPlaceCache:
    """Keys and values [2, L, 1, Hkv, S, D] of one request, the first `length` of S rows valid. See `Slot`."""

    def __init__(self, dims: GraphDims) -> None:
        self.length = 0
        self._shape = (2, dims.num_layers, 1, dims.key_value_heads)
        self._head_dim = dims.head_dim
        self.arrays: NDArray = np.zeros((*self._shape, 0, dims.head_dim), dtype=dims.dtype)

    @property
    def capacity(self) -> int:
        """S, the rows that there is memory for."""
        return self.arrays.shape[4]

    def reserve(self, rows: int) -> None:
        """Have room for `rows` more rows. S grows by a quarter at least; no pass reads what is not valid."""
        needed = self.length + rows
        if needed <= self.capacity:
            return
        target = max(needed, self.capacity + self.capacity // 4)
        capacity = -(-target // BLOCK) * BLOCK
        wider = np.zeros((*self._shape, capacity, self._head_dim), dtype=self.arrays.dtype)
        wider[..., : self.length, :] = self.arrays[..., : self.length, :]
        self.arrays = wider

    def commit(self, rows: Sequence[int]) -> None:
        """Accept `rows` of the pass before, in that order, which it has left behind the valid ones."""
        start = self.length
        moved = [(place, row) for place, row in enumerate(rows) if place != row]
        if moved:
            places, sources = (start + np.array(side) for side in zip(*moved, strict=True))
            self.arrays[..., places, :] = self.arrays[..., sources, :]
        self.length = start + len(rows)


@dataclass(frozen=True)
class InPlaceResult:
    """Pass `number` of an engine, of one request: logits [M, V], draft_logits [sum R_k, V]; new keys and values are in
    the cache. See `Result`.
    """

    batch: Batch
    logits: NDArray[np.float32]
    draft_logits: NDArray[np.float32]
    number: int
    freshness: Freshness

    def outputs(self, index: int) -> HostOutputs:
        """See `Result.outputs`."""
        self.freshness.check(self.number)
        return HostOutputs(self.batch.rows[index], self.logits, self.draft_logits)

    def new(self, dims: GraphDims) -> tuple[list[NDArray], list[NDArray]]:
        """Return the new keys and the new values, not committed yet: L arrays [1, Hkv, R_l, D] each."""
        self.freshness.check(self.number)
        (rows,), (slot,) = self.batch.rows, self.batch.slots
        cache = _cache_of(slot)
        sizes = dynamic_dims(len(rows.input_ids), rows.counts, 0, 0)
        alive = [sum(sizes[part] for part in dims.rows_alive(layer).split(" + ")) for layer in range(dims.num_layers)]
        keys, values = (
            [cache.arrays[kind, layer, :, :, cache.length : cache.length + count] for layer, count in enumerate(alive)]
            for kind in range(2)
        )
        return keys, values


class OnnxRuntimeCpuEngine:
    """An ONNX Runtime session of a lowered graph; `threads` and `small` as for `OnnxRuntimeEngine`."""

    # `GroupQueryAttention` takes several rows over a cache of one request only.
    max_batch = 1
    max_slots = MANY
    gpu_name = None

    def __init__(
        self, graph: Path | GraphFiles, dims: GraphDims, threads: int | None = None, *, small: bool = False
    ) -> None:
        self._session = open_session(
            graph, dims.inputs(), dims.lowered_outputs(), ["CPUExecutionProvider"], threads, small=small
        )
        self.dims = dims
        self._path = path_of(graph)
        self._binding = self._session.io_binding()
        self._bound: weakref.ref[NDArray] | None = None
        self._freshness = Freshness()
        self._logits = np.empty((0, dims.vocab_size), dtype=np.float32)
        self._drafts = np.empty((0, dims.vocab_size), dtype=np.float32)

    def new_slot(self) -> InPlaceCache:
        """See `Engine.new_slot`."""
        return InPlaceCache(self.dims)

    def run(self, batch: Batch) -> InPlaceResult:
        """See `Engine.run`. New keys and values are in the cache alone."""
        (slot,) = batch.slots
        cache = _cache_of(slot)
        laid_out = stack(batch, self.dims.join_order)
        drafts = sum(laid_out.sizes.pseudo_rows)
        cache.reserve(laid_out.sizes.tree_rows + drafts)
        self._bind_cache(cache)
        number = self._freshness.next_pass()
        # Kept until the pass is over: they are bound by address.
        values = {name: np.ascontiguousarray(value) for name, value in laid_out.values.items()}
        for name, value in values.items():
            self._binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        self._logits = _room_for(self._logits, laid_out.logit_count)
        self._drafts = _room_for(self._drafts, drafts)
        sizes = laid_out.dims(cache.capacity)
        for binding, buffer in zip(self.dims.outputs()[:2], (self._logits, self._drafts), strict=True):
            shape = binding.sizes(sizes)
            self._binding.bind_output(binding.name, "cpu", 0, np.float32, shape, buffer.ctypes.data)
        with running(self._path):
            self._session.run_with_iobinding(self._binding)
        logits, draft_logits = self._logits[: laid_out.logit_count], self._drafts[:drafts]
        return InPlaceResult(batch, logits, draft_logits, number, self._freshness)

    def commit(self, result: Result, accepted: Sequence[Sequence[int]]) -> None:
        """See `Engine.commit`."""
        assert isinstance(result, InPlaceResult), "a result of another engine"
        self._freshness.commit(result.number)
        for slot, rows in zip(result.batch.slots, accepted, strict=True):
            _cache_of(slot).commit(rows)

    def _bind_cache(self, cache: InPlaceCache) -> None:
        arrays = cache.arrays
        if self._bound is not None and self._bound() is arrays:
            return
        for layer in range(self.dims.num_layers):
            names = (
                (bindings.key_cache(layer), bindings.key_cache_out(layer)),
                (bindings.value_cache(layer), bindings.value_cache_out(layer)),
            )
            for array, (source, target) in zip(arrays[:, layer], names, strict=True):
                where = ("cpu", 0, array.dtype, array.shape, array.ctypes.data)
                self._binding.bind_input(source, *where)
                self._binding.bind_output(target, *where)
        self._bound = weakref.ref(arrays)


def _cache_of(slot: Slot) -> InPlaceCache:
    assert isinstance(slot, InPlaceCache), "a slot of another engine"
    return slot


def _room_for(buffer: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    return buffer if rows <= len(buffer) else np.empty((rows, buffer.shape[1]), dtype=np.float32)
