"""The graph lowered for ONNX Runtime on the CPU, which writes new keys and values into the cache where it is.

A pass copies nothing that it does not compute: the cache is bound once as input and as output, its valid rows are read
in place, and logits go into buffers that are used again. Rows behind the valid ones are left by passes before and never
read; committing moves the accepted ones among them together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import bindings
from runtime.bindings import GraphDims, dynamic_dims
from runtime.engines.dense_cache import DenseCache, KeptRows, slot_of
from runtime.engines.external_weights import GraphFiles
from runtime.engines.onnxruntime import check_bindings, open_session, path_of, running
from runtime.engines.packing import PackedInputs, pack
from runtime.engines.places import PlacedSlot
from runtime.engines.protocol import Batch, Freshness, Kept, Result, Slot
from runtime.rows import HostOutputs, PickedRows, Rows, lay_out
from runtime.tree import chain

# Requests of a pass, where the graph takes any number.
MAX_BATCH = 64
MAX_SLOTS = 1 << 10
# Of the places that a pass of one row each spans, the share that may be others'.
GAPS = 4
# Sets of slots whose caches stay bound.
MOST_BOUND = 8


@dataclass(frozen=True)
class InPlaceResult:
    """Pass `number` of an engine, `laid_out` as it was: logits [N, V] and draft logits [N', V_d] of all requests; new
    keys and values are in the cache. `places` [B] are those of the requests among all that were run. See `Result`.
    """

    batch: Batch
    laid_out: PackedInputs
    places: tuple[int, ...]
    logits: NDArray[np.float32]
    draft_logits: NDArray[np.float32]
    cache: DenseCache
    number: int
    freshness: Freshness

    def outputs(self, index: int) -> HostOutputs:
        """See `Result.outputs`."""
        self.freshness.check(self.number)
        rows, place = self.batch.rows[index], self.places[index]
        drafts = PickedRows(self.draft_logits, self.laid_out.pseudo[place])
        return HostOutputs(rows, self.logits[self.laid_out.logits[place]], drafts)

    def new(self, dims: GraphDims) -> tuple[list[NDArray], list[NDArray]]:
        """Return the new keys and the new values of a pass of one request, not committed yet: L arrays [1, Hkv, R_l, D]
        each.
        """
        self.freshness.check(self.number)
        (rows,), (slot,) = self.batch.rows, self.batch.slots
        sizes = dynamic_dims(len(rows.input_ids), rows.counts, 0, 0)
        alive = [sum(sizes[part] for part in dims.rows_alive(layer).split(" + ")) for layer in range(dims.num_layers)]
        start = slot.length
        keys, values = (
            [kind[layer, None, :, start : start + count] for layer, count in enumerate(alive)]
            for kind in self.cache.of(slot_of(slot))
        )
        return keys, values


class BoundPass:
    """A `binding` of a session, and what passes of the same slots give it. What has the shape that it had in the pass
    before is bound already: binding everything anew takes longer than all else that is done for a small pass.
    """

    def __init__(self, binding: Any) -> None:
        self.binding = binding
        # They are bound by address.
        self._inputs: dict[str, NDArray] = {}
        self._outputs: dict[str, tuple[int, tuple[int, ...]]] = {}

    def give(self, name: str, value: NDArray) -> None:
        """Have a copy of `value` as the input `name`."""
        held = self._inputs.get(name)
        if held is not None and held.shape == value.shape:
            held[...] = value
            return
        held = np.array(value, order="C")
        self.binding.bind_input(name, "cpu", 0, held.dtype, held.shape, held.ctypes.data)
        self._inputs[name] = held

    def take(self, name: str, buffer: NDArray[np.float32], shape: tuple[int, ...]) -> None:
        """Have the output `name`, of this shape, written into `buffer`, which the caller keeps."""
        where = (buffer.ctypes.data, shape)
        if self._outputs.get(name) != where:
            self.binding.bind_output(name, "cpu", 0, np.float32, shape, where[0])
            self._outputs[name] = where


class OnnxRuntimeCpuEngine:
    """An ONNX Runtime session of a lowered graph; `threads` and `small` as for `OnnxRuntimeEngine`."""

    max_slots = MAX_SLOTS
    gpu_name = None

    def __init__(
        self, graph: Path | GraphFiles, dims: GraphDims, threads: int | None = None, *, small: bool = False
    ) -> None:
        self._session = open_session(graph, ["CPUExecutionProvider"], threads, small=small, exact_sums=True)
        self.dims = dims
        about = self._session.get_modelmeta().custom_metadata_map
        # Graphs of earlier releases are for one request.
        self.packs = about.get(bindings.REQUESTS) == bindings.PACKED
        self.max_batch = MAX_BATCH if self.packs else 1
        self._inputs = {binding.name for binding in (dims.lowered_inputs() if self.packs else dims.inputs())}
        self._logit_outputs = [binding.name for binding in dims.outputs()[:2]]
        self._path = path_of(graph)
        inputs = dims.lowered_inputs() if self.packs else dims.inputs()
        check_bindings(self._session, self._path, inputs, dims.lowered_outputs())
        self._cache = DenseCache(dims)
        self._bound: OrderedDict[tuple[int, int], BoundPass] = OrderedDict()
        self._bound_arrays = self._cache.arrays
        self._freshness = Freshness()
        self._logits = np.empty((0, dims.vocab_size), dtype=np.float32)
        self._drafts = np.empty((0, dims.draft_width), dtype=np.float32)

    @property
    def cache(self) -> DenseCache:
        """The keys and values of all slots, for what reads them where they are, and writes behind committed ones."""
        return self._cache

    @property
    def row_bytes(self) -> int:
        """See `Engine.row_bytes`."""
        return self.dims.row_bytes

    def new_slot(self) -> PlacedSlot:
        """See `Engine.new_slot`."""
        return self._cache.new_slot()

    def keep(self, slot: Slot, rows: int) -> KeptRows:
        """See `Engine.keep`."""
        return self._cache.keep(slot_of(slot), rows)

    def copy(self, source: Slot | Kept, target: Slot, rows: int) -> None:
        """See `Engine.copy`."""
        self._cache.copy(source, slot_of(target), rows)

    def release(self, slot: Slot) -> None:
        """See `Engine.release`."""
        self._cache.release(slot_of(slot))

    def run(self, batch: Batch) -> InPlaceResult:
        """See `Engine.run`. New keys and values are in the cache alone."""
        assert len(batch) <= self.max_batch
        slots = [slot_of(slot) for slot in batch.slots]
        several = len(batch) > 1 and any(len(rows.position_ids) > 1 for rows in batch.rows)
        first, count = self._cache.arrange(slots, 0 if several else len(batch) // GAPS)
        places = tuple(slot.place.index - first for slot in slots)
        whole, lengths = self._filled(batch, slots, first, count)
        laid_out = pack(whole, lengths, self.dims.join_order)
        self._cache.reserve(max(lengths), laid_out.written)
        number = self._freshness.next_pass()
        bound = self._bound_pass(first, count)
        for name, value in laid_out.values.items():
            if name in self._inputs:
                bound.give(name, value)
        self._logits = _room_for(self._logits, laid_out.logit_rows)
        self._drafts = _room_for(self._drafts, laid_out.pseudo_rows)
        logits, draft_logits = self._logits[: laid_out.logit_rows], self._drafts[: laid_out.pseudo_rows]
        stacked = len(laid_out.values[bindings.INPUT_IDS])
        for name, buffer in zip(self._logit_outputs, (logits, draft_logits), strict=True):
            bound.take(name, buffer, (stacked, len(buffer) // stacked, buffer.shape[1]))
        with running(self._path):
            self._session.run_with_iobinding(bound.binding)
        return InPlaceResult(batch, laid_out, places, logits, draft_logits, self._cache, number, self._freshness)

    def commit(self, result: Result, accepted: Sequence[Sequence[int]]) -> None:
        """See `Engine.commit`."""
        assert isinstance(result, InPlaceResult), "a result of another engine"
        self._freshness.commit(result.number)
        for slot, rows in zip(result.batch.slots, accepted, strict=True):
            self._cache.commit(slot_of(slot), rows, result.laid_out.written)

    def _filled(
        self, batch: Batch, slots: Sequence[PlacedSlot], first: int, count: int
    ) -> tuple[list[Rows], list[int]]:
        """Return the rows of `count` places from `first` on, and how many are committed in each. What lies between the
        slots of the batch has one row of no meaning, behind the committed ones.
        """
        own = {slot.place.index: rows for rows, slot in zip(batch.rows, slots, strict=True)}
        lengths = [self._cache.length_at(index) for index in range(first, first + count)]
        nothing = (np.empty(0, dtype=np.int64),) * self.dims.num_steps
        rows = [
            own[index]
            if index in own
            else lay_out(chain([0]), nothing, self.dims.join_order, length, phase=batch.phase)
            for index, length in zip(range(first, first + count), lengths, strict=True)
        ]
        return rows, lengths

    def _bound_pass(self, first: int, count: int) -> BoundPass:
        """Return what has the caches of `count` slots from `first` on bound."""
        arrays = self._cache.arrays
        if arrays is not self._bound_arrays:
            self._bound.clear()
            self._bound_arrays = arrays
        key = (first, count)
        if (bound := self._bound.get(key)) is not None:
            self._bound.move_to_end(key)
            return bound
        binding = self._session.io_binding()
        for layer in range(self.dims.num_layers):
            names = (
                (bindings.key_cache(layer), bindings.key_cache_out(layer)),
                (bindings.value_cache(layer), bindings.value_cache_out(layer)),
            )
            for kind, (source, target) in enumerate(names):
                array = arrays[kind, layer, first : first + count]
                where = ("cpu", 0, array.dtype, array.shape, array.ctypes.data)
                binding.bind_input(source, *where)
                binding.bind_output(target, *where)
        bound = self._bound[key] = BoundPass(binding)
        if len(self._bound) > MOST_BOUND:
            self._bound.popitem(last=False)
        return bound


def _room_for(buffer: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    return buffer if rows <= len(buffer) else np.empty((rows, buffer.shape[1]), dtype=np.float32)
