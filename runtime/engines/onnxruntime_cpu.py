"""The graph lowered for ONNX Runtime on the CPU, which writes new keys and values into the cache where it is.

A pass copies nothing that it does not compute: the cache is bound once as input and as output, its valid rows are read
in place, and logits go into buffers that are used again. Rows behind the valid ones are left by passes before and never
read; committing moves the accepted ones among them together.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime import bindings
from runtime.bindings import GraphDims, dynamic_dims
from runtime.engines import Outputs
from runtime.engines.onnxruntime import open_session
from runtime.tree import Rows

BLOCK = 256


class InPlaceCache:
    """Keys and values [2, L, 1, Hkv, S, D] of one sequence, the first `length` of S rows valid. See `Cache`."""

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

    def commit(self, outputs: Outputs, rows: Sequence[int]) -> None:
        """See `Cache.commit`: the pass has left its rows behind the valid ones."""
        start = self.length
        moved = [(place, row) for place, row in enumerate(rows) if place != row]
        if moved:
            places, sources = (start + np.array(side) for side in zip(*moved, strict=True))
            self.arrays[..., places, :] = self.arrays[..., sources, :]
        self.length = start + len(rows)


class OnnxRuntimeCpuEngine:
    """An ONNX Runtime session of a lowered graph; `threads` and `small` as for `OnnxRuntimeEngine`."""

    def __init__(self, path: Path, dims: GraphDims, threads: int | None = None, *, small: bool = False) -> None:
        self._session = open_session(
            path, dims.inputs(), dims.lowered_outputs(), ["CPUExecutionProvider"], threads, small=small
        )
        self.dims = dims
        self._binding = self._session.io_binding()
        self._bound: weakref.ref[NDArray] | None = None
        self._logits = np.empty((0, dims.vocab_size), dtype=np.float32)
        self._drafts = np.empty((0, dims.vocab_size), dtype=np.float32)

    def new_cache(self) -> InPlaceCache:
        """See `Engine.new_cache`."""
        return InPlaceCache(self.dims)

    def run(self, rows: Rows, cache: InPlaceCache) -> Outputs:
        """See `Engine.run`. Outputs hold until the next pass; new keys and values are in the cache alone."""
        counts = [len(parents) for parents in rows.pseudo_parents]
        cache.reserve(len(rows.position_ids))
        self._bind_cache(cache)
        # Kept until the pass is over: they are bound by address.
        values = {
            bindings.INPUT_IDS: rows.input_ids,
            bindings.POSITION_IDS: rows.position_ids,
            bindings.TREE_MASK: rows.tree_mask,
            bindings.LOGIT_ROWS: rows.logit_rows,
            bindings.CACHE_LENGTH: np.array(cache.length, dtype=np.int64),
        }
        for step, parents in enumerate(rows.pseudo_parents, start=1):
            values[bindings.pseudo_parent(step)] = parents
        for name, value in values.items():
            values[name] = whole = np.ascontiguousarray(value)
            shape = (1, *value.shape)
            self._binding.bind_input(name, "cpu", 0, whole.dtype, shape, whole.ctypes.data)
        self._logits = _room_for(self._logits, len(rows.logit_rows))
        self._drafts = _room_for(self._drafts, sum(counts))
        sizes = dynamic_dims(len(rows.input_ids), counts, len(rows.logit_rows), cache.capacity)
        for binding, buffer in zip(self.dims.outputs()[:2], (self._logits, self._drafts), strict=True):
            shape = binding.sizes(sizes)
            self._binding.bind_output(binding.name, "cpu", 0, np.float32, shape, buffer.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        return Outputs(self._logits[: len(rows.logit_rows)], self._drafts[: sum(counts)], (), ())

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


def new_rows(cache: InPlaceCache, dims: GraphDims, rows: Rows) -> tuple[list[NDArray], list[NDArray]]:
    """Return the new keys and the new values of the last pass, over `rows`: L arrays [1, Hkv, R_l, D] each."""
    counts = [len(parents) for parents in rows.pseudo_parents]
    sizes = dynamic_dims(len(rows.input_ids), counts, 0, 0)
    alive = [sum(sizes[part] for part in dims.rows_alive(layer).split(" + ")) for layer in range(dims.num_layers)]
    keys, values = (
        [cache.arrays[kind, layer, :, :, cache.length : cache.length + count] for layer, count in enumerate(alive)]
        for kind in range(2)
    )
    return keys, values


def _room_for(buffer: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    return buffer if rows <= len(buffer) else np.empty((rows, buffer.shape[1]), dtype=np.float32)
