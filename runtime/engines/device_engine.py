"""What engines have in common whose cache, inputs and outputs are on a GPU."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from runtime.bindings import GraphDims
from runtime.bundle.engine_file import CAPACITY_STEP, Limits
from runtime.engines.buffers import DeviceResult, PassBuffers
from runtime.engines.choosing import DeviceChoices
from runtime.engines.cuda import Cuda, DeviceMemoryError
from runtime.engines.device_cache import CacheBudget, DeviceCache, KeptDeviceRows, capacities, slot_of, source_of
from runtime.engines.layout import BatchInputs, shared_sizes, stack
from runtime.engines.places import PlacedSlot
from runtime.engines.protocol import Batch, Freshness, Kept, Result, Slot
from runtime.errors import EngineError, InputError
from runtime.rows import Outputs, Phase, lay_out
from runtime.tree import TreeSizes, chain

UNLIMITED = 1 << 40


class DeviceEngine(ABC):
    """An engine on a GPU, of passes within `limits`. It is made once the weights are loaded: keys and values take up to
    `memory_bytes` of what is free then, None for `share` of that. Raises `InputError` where that is too little, or not
    there.
    """

    packs = False

    def __init__(
        self, cuda: Cuda, dims: GraphDims, limits: Limits, memory_bytes: int | None, share: tuple[int, int]
    ) -> None:
        self.dims = dims
        self._cuda = cuda
        self._limits = limits
        self._buffers = PassBuffers(cuda, dims, limits)
        self._freshness = Freshness()
        # Where there are kernels for it.
        self._choices: DeviceChoices | None = None
        self.budget = _budget(cuda, dims, limits, memory_bytes, share)
        self.cache = DeviceCache(cuda, dims, self.budget)
        self.max_batch = self.max_slots = self.budget.most_slots

    @property
    def row_bytes(self) -> int:
        """See `Engine.row_bytes`."""
        return self.dims.row_bytes

    @property
    def gpu_name(self) -> str:
        """The GPU that passes run on."""
        return self._cuda.name

    @property
    def request_rows(self) -> int:
        """The rows that a request may take, those of its passes among them: no less than its context, where there is
        memory for that, as rows that are not accepted are never in the cache.
        """
        return self.budget.slot_rows if self.budget.slot_rows < self._limits.capacity else UNLIMITED

    def new_slot(self) -> PlacedSlot:
        """See `Engine.new_slot`."""
        self._cuda.use()
        return self.cache.new_slot()

    def keep(self, slot: Slot, rows: int) -> KeptDeviceRows:
        """See `Engine.keep`. Raises `InputError` when there is too little memory: the engine goes on."""
        self._cuda.use()
        return self.cache.keep(slot_of(slot), rows)

    def copy(self, source: Slot | Kept, target: Slot, rows: int) -> None:
        """See `Engine.copy`."""
        self._cuda.use()
        with _fatal():
            self.cache.copy(source_of(source), slot_of(target), rows)

    def release(self, slot: Slot) -> None:
        """See `Engine.release`."""
        self._cuda.use()
        self.cache.release(slot_of(slot))

    def run(self, batch: Batch) -> DeviceResult:
        """See `Engine.run`. Raises `InputError` for what does not fit, and `EngineError` when the GPU's memory is used
        up.
        """
        assert len(batch) <= self.max_batch
        self._cuda.use()
        slots = [slot_of(slot) for slot in batch.slots]
        self._check(batch)
        with _fatal():
            places, together = self._places(batch)
            more = [len(rows.input_ids) for rows in batch.rows]
            first, count = self.cache.arrange(slots, more, places, together=together)
            laid_out = self._lay_out(batch, slots, first, count)
            self._buffers.fit(laid_out)
            number = self._freshness.next_pass()
            self._run(batch, laid_out, first)
            own = tuple(slot.place.index - first for slot in slots)
            chosen = self._choose(batch, laid_out, own)
            self._cuda.synchronise()
        return DeviceResult(batch, laid_out, first, own, self._buffers, number, self._freshness, chosen)

    def commit(self, result: Result, accepted: Sequence[Sequence[int]]) -> None:
        """See `Engine.commit`: copies the accepted rows of all requests behind those of the cache."""
        assert isinstance(result, DeviceResult), "a result of another engine"
        self._freshness.commit(result.number)
        self._cuda.use()
        slots = [slot_of(slot) for slot in result.batch.slots]
        every: list[Sequence[int]] = [()] * len(result.laid_out.pseudo)
        for slot, place, rows in zip(slots, result.places, accepted, strict=True):
            assert slot.place.index == result.first + place, "a pass is committed before anything is done with slots"
            every[place] = rows
        if any(map(len, every)):
            self._commit_rows(result, every)
        for slot, rows in zip(slots, accepted, strict=True):
            slot.place.length += len(rows)

    def _choose(self, batch: Batch, laid_out: BatchInputs, places: Sequence[int]) -> Sequence[Outputs] | None:
        """Enqueue the choices of a pass; or the copy of its logits to the host, where choices are made there."""
        if self._choices is not None:
            return self._choices.enqueue(batch.rows, laid_out, *self._buffers.logit_addresses, places)
        self._buffers.download_logits(len(laid_out.pseudo) * laid_out.logit_count)
        return None

    def _check(self, batch: Batch) -> None:
        """Raise `InputError` for a batch that does not fit."""
        check_rows(batch, self._limits)

    @abstractmethod
    def _places(self, batch: Batch) -> tuple[int, bool]:
        """Return the places of a pass over `batch`, and whether they must be the first of all."""

    @abstractmethod
    def _sizes(self, batch: Batch) -> TreeSizes | None:
        """Return the sizes to bring the rows of `batch` to, None for the least."""

    @abstractmethod
    def _run(self, batch: Batch, laid_out: BatchInputs, first: int) -> None:
        """Enqueue the pass over the places from `first` on."""

    @abstractmethod
    def _commit_rows(self, result: DeviceResult, accepted: Sequence[Sequence[int]]) -> None:
        """Enqueue the copies of the `accepted` rows of each place of a pass."""

    def _lay_out(self, batch: Batch, slots: Sequence[PlacedSlot], first: int, count: int) -> BatchInputs:
        """Return the rows of `count` places from `first` on. Those of no request of the batch have one row of no
        meaning, which sees itself alone: nothing of them is read, and nothing is committed.
        """
        own = {slot.place.index - first: index for index, slot in enumerate(slots)}
        nothing = (np.empty(0, dtype=np.int64),) * self.dims.num_steps
        idle = lay_out(chain([0]), nothing, self.dims.join_order, 0, phase=batch.phase)
        rows = [batch.rows[own[place]] if place in own else idle for place in range(count)]
        lengths = [slots[own[place]].length if place in own else 0 for place in range(count)]
        return stack(rows, lengths, self.dims.join_order, self._sizes(batch))


def check_rows(batch: Batch, limits: Limits) -> None:
    """Raise `InputError` for a batch of more rows than `limits` allow."""
    sizes = shared_sizes(batch.rows)
    most = limits.chunk if batch.phase is Phase.PROMPT else limits.max_rows
    if (rows := max(sizes.tree_rows, *sizes.pseudo_rows)) > most:
        raise InputError(f"a pass of {rows} rows; this engine takes at most {most}, use fewer")


def _budget(
    cuda: Cuda, dims: GraphDims, limits: Limits, memory_bytes: int | None, share: tuple[int, int]
) -> CacheBudget:
    free = cuda.free_memory()
    if memory_bytes is not None and memory_bytes > free:
        raise InputError(
            f"gpu_memory_bytes is {memory_bytes}, and of the GPU's memory {free} bytes are free once the weights are "
            "loaded; give at most that, or leave it out"
        )
    allowed = free * share[0] // share[1] if memory_bytes is None else memory_bytes
    rows = allowed // dims.row_bytes
    # What one request may have at most: all that there is where that is less than the engine takes.
    most = min(limits.capacity, rows // CAPACITY_STEP * CAPACITY_STEP)
    if most < CAPACITY_STEP:
        needed = CAPACITY_STEP * dims.row_bytes
        if memory_bytes is None:
            raise DeviceMemoryError(
                f"the GPU has too little memory: {needed >> 20} MiB are needed for keys and values and {free >> 20} "
                "MiB are free once the weights are loaded; end other programs that use the GPU, or use a larger one"
            )
        raise InputError(f"gpu_memory_bytes is {memory_bytes}, and this engine needs {needed} at least; give more")
    smallest = capacities(most)[0]
    fits = [count for count in range(1, limits.max_batch + 1) if count * smallest <= rows]
    # Passes have a power of two of places.
    slots = fits[-1] if fits[-1] == limits.max_batch else 1 << fits[-1].bit_length() - 1
    return CacheBudget(rows, dims.row_bytes, slots, most)


@contextlib.contextmanager
def _fatal() -> Iterator[None]:
    """Turn a lack of memory into the end of the engine: what it was in the middle of cannot be undone."""
    try:
        yield
    except DeviceMemoryError as error:
        raise EngineError(f"the engine failed: {error}") from error
