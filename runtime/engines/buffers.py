"""Where the inputs and outputs of passes on a GPU are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plugins.launch import Commit
from runtime import bindings
from runtime.arrays import IntArray
from runtime.bindings import BYTES, GraphDims, dynamic_dims
from runtime.bundle.engine_file import Limits
from runtime.engines.cuda import Cuda, DeviceMemory
from runtime.engines.device_cache import DeviceCache
from runtime.engines.layout import BatchInputs
from runtime.engines.protocol import Batch, Freshness
from runtime.rows import HostOutputs, LogitRows, Outputs, PickedRows
from runtime.tree import TreeSizes

ALIGNMENT = 256


class PassBuffers:
    """The inputs of a pass but for the cache, in one block of pinned memory and one on the device; and its outputs.

    There is room for any pass of one request within `limits`, those of the plan, from the beginning, and for several as
    they come: then some of it moves, and `generation` changes.
    """

    def __init__(self, cuda: Cuda, dims: GraphDims, limits: Limits) -> None:
        self._cuda = cuda
        self._dims = dims
        self._limits = limits
        self.generation = 0
        steps = dims.num_steps
        # A prompt chunk drafts at its last row only.
        self._most = max(limits.max_rows * (1 + steps), limits.chunk + steps)
        self._most_tree = max(limits.max_rows, limits.chunk)
        self._logit_bytes, self._draft_bytes = 4 * dims.vocab_size, 4 * dims.draft_width
        self._row_host = cuda.pinned(self._logit_bytes)
        # Of the logits of small passes all come to the host.
        self._logits_host = cuda.pinned(limits.max_rows * self._logit_bytes)
        self._table_host = cuda.pinned(2 * dims.num_layers * (8 + 8 + 4))
        self._table = cuda.allocate(len(self._table_host))
        self._table_of: tuple[int, ...] = ()
        self._logits = _GrowingRows(cuda, self._logit_bytes, limits.max_rows)
        self._drafts = _GrowingRows(cuda, self._draft_bytes, max(1, limits.max_rows * steps))
        # Keys and values of all layers; arrays of so many rows end where another may begin.
        self._new_row = dims.key_value_heads * dims.head_dim * BYTES[dims.dtype]
        self._new = _GrowingRows(cuda, 2 * dims.num_layers * self._new_row, _align(self._most))
        self._batch = 1
        self._place_inputs()

    def fit(self, laid_out: BatchInputs) -> None:
        """Have room for a pass. Raises `DeviceMemoryError` where the GPU has too little memory."""
        sizes, batch = laid_out.sizes, len(laid_out.pseudo)
        pseudo = sum(sizes.pseudo_rows)
        found = (
            (self._logits, batch * laid_out.logit_count),
            (self._drafts, batch * pseudo),
            (self._new, batch * (sizes.tree_rows + pseudo)),
        )
        if batch <= self._batch and all(count <= rows.count for rows, count in found):
            return
        # What is replaced may still be copied from.
        self._cuda.synchronise()
        self.generation += 1
        if batch > self._batch:
            self._batch = batch
            self._place_inputs()
        for rows, count in found:
            rows.fit(count)

    def _place_inputs(self) -> None:
        most, batch = self._limits.max_rows, self._batch
        largest = dynamic_dims(self._most_tree, (most,) * self._dims.num_steps, most, 0, batch) | {"R": self._most}
        self._offsets: dict[str, int] = {}
        end = 0
        # The mask last: it is the largest by far, and a small pass sends its beginning alone.
        for binding in sorted(self._dims.inputs(), key=lambda binding: binding.name == bindings.TREE_MASK):
            if not binding.name.startswith(bindings.CACHE_PREFIXES):
                self._offsets[binding.name] = end
                end += _align(math.prod(binding.sizes(largest)) * (1 if binding.dtype == "bool" else 8))
        self._used = end
        self._host = self._cuda.pinned(end)
        self._device = self._cuda.allocate(end)
        # The number of rows that each request accepts, then the rows.
        size = _align(4 * batch) + 4 * batch * self._most_tree
        self._accepted_host = self._cuda.pinned(size)
        self._accepted = self._cuda.allocate(size)

    def addresses(self, cache: DeviceCache, first: int) -> dict[str, int]:
        """Return the device address of every input and output, among them those of `cache` from place `first` on."""
        found = {name: self._device.address + offset for name, offset in self._offsets.items()}
        for layer in range(self._dims.num_layers):
            found[bindings.key_cache(layer)], found[bindings.value_cache(layer)] = cache.addresses(layer, first)
            found[bindings.key_new(layer)], found[bindings.value_new(layer)] = self.new(layer)
        found[bindings.LOGITS] = self._logits.address
        found[bindings.DRAFT_LOGITS] = self._drafts.address
        return found

    @property
    def logit_addresses(self) -> tuple[int, int]:
        """The device addresses of the logits and of the draft logits."""
        return self._logits.address, self._drafts.address

    def new(self, layer: int) -> tuple[int, int]:
        """Return the addresses of the new keys and values [B, Hkv, R_l, D] of `layer`."""
        size = self._new.count * self._new_row
        start = self._new.address + 2 * layer * size
        return start, start + size

    def rows_alive(self, sizes: TreeSizes, layer: int) -> int:
        """Return R_l of a pass of these sizes."""
        joins = self._dims.transfer_layers
        return sizes.tree_rows + sum(rows for rows, at in zip(sizes.pseudo_rows, joins, strict=True) if at <= layer)

    def write(self, laid_out: BatchInputs) -> None:
        """Put the inputs of a pass into the pinned block."""
        for name, value in laid_out.values.items():
            flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            self._host[self._offsets[name] : self._offsets[name] + len(flat)] = flat
        self._used = self._offsets[bindings.TREE_MASK] + laid_out.values[bindings.TREE_MASK].size

    def upload(self) -> None:
        """Enqueue the copy of the inputs to the device, as many bytes as passes of these shapes have."""
        self._cuda.upload(self._device.address, self._host, self._used)

    def comes_whole(self, rows: int) -> bool:
        """Return whether the logits of a pass, of so many rows of all requests together, all come to the host."""
        return rows <= self._limits.max_rows

    def download_logits(self, rows: int) -> None:
        """Enqueue the copy of the logits of a pass to the host, where they come whole."""
        if self.comes_whole(rows):
            self._cuda.download(self._logits_host, self._logits.address, rows * self._logit_bytes)

    def logits(self, rows: int) -> LogitRows:
        """Return the base model's logits [rows, V] of the last pass, all requests' after each other; the next pass
        overwrites them.
        """
        if not self.comes_whole(rows):
            return FetchedRows(self._cuda, self._row_host, self._logits.address, rows)
        vocab = self._dims.vocab_size
        return self._logits_host.view(np.float32)[: rows * vocab].reshape(rows, vocab)

    def drafts(self, rows: int) -> LogitRows:
        """Return the draft logits [rows, V_d] of the last pass, all requests' after each other."""
        return FetchedRows(self._cuda, self._row_host[: self._draft_bytes], self._drafts.address, rows)

    def commit(self, cache: DeviceCache, first: int, sizes: TreeSizes, accepted: Sequence[Sequence[int]]) -> Commit:
        """Send what the commit of the `accepted` rows [B] of the last pass needs, which had these `sizes` and began at
        place `first` of `cache`; return where it is.
        """
        batch, most = len(accepted), max(map(len, accepted))
        counts_size = _align(4 * batch)
        ints = self._accepted_host.view(np.int32)
        ints[:batch] = [len(rows) for rows in accepted]
        table = ints[counts_size // 4 :][: batch * most].reshape(batch, most)
        for request, rows in enumerate(accepted):
            table[request, : len(rows)] = rows
        self._cuda.upload(self._accepted.address, self._accepted_host, counts_size + 4 * batch * most)
        layers = self._dims.num_layers
        count = 2 * layers
        # Most steps commit by the table of the step before.
        wanted = (self.generation, cache.generation, sizes.tree_rows, *sizes.pseudo_rows)
        if wanted != self._table_of:
            alive = [self.rows_alive(sizes, layer) for layer in range(layers)]
            host = self._table_host
            host[: 8 * count].view(np.int64)[:] = [address for layer in range(layers) for address in self.new(layer)]
            targets = [address for layer in range(layers) for address in cache.addresses(layer)]
            host[8 * count : 16 * count].view(np.int64)[:] = targets
            host[16 * count :].view(np.int32)[:] = np.repeat(alive, 2)
            self._cuda.upload(self._table.address, host)
            self._table_of = wanted
        start = self._table.address
        return Commit(
            sources=start,
            targets=start + 8 * count,
            source_rows=start + 16 * count,
            # As the pass had them: nothing was committed since.
            lengths=self._device.address + self._offsets[bindings.CACHE_LENGTH],
            accepted=self._accepted.address + counts_size,
            counts=self._accepted.address,
            arrays=count,
            batch=batch,
            kv_heads=self._dims.key_value_heads,
            first=first,
            most=most,
            capacity=cache.capacity,
        )


class _GrowingRows:
    """Device memory of `count` rows, which moves when more are needed; what was there is lost then."""

    def __init__(self, cuda: Cuda, row_bytes: int, count: int) -> None:
        self._cuda = cuda
        self._row_bytes = row_bytes
        self.count = count
        self._memory: DeviceMemory | None = cuda.allocate(count * row_bytes)

    @property
    def address(self) -> int:
        assert self._memory is not None
        return self._memory.address

    def fit(self, count: int) -> None:
        """Have room for `count` rows; for a power of two, so that it is not for each pass anew."""
        if count > self.count:
            self._memory = None
            self.count = max(ALIGNMENT, 1 << (count - 1).bit_length())
            self._memory = self._cuda.allocate(self.count * self._row_bytes)


class FetchedRows:
    """Rows of logits on the GPU, each fetched when it is asked for, by way of `pinned` memory for one of them."""

    def __init__(self, cuda: Cuda, pinned: NDArray[np.uint8], start: int, count: int) -> None:
        self._cuda = cuda
        self._pinned = pinned
        self._start = start
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        if not 0 <= row < self._count:
            raise IndexError(f"row {row} of {self._count} rows of logits")
        self._cuda.use()
        self._cuda.download(self._pinned, self._start + row * self._pinned.nbytes)
        self._cuda.synchronise()
        return self._pinned.view(np.float32).copy()


@dataclass(frozen=True)
class DeviceResult:
    """Pass `number` on a GPU, laid out as `laid_out` says, over the places of the cache from `first` on: all of it is
    where the pass left it. `places` [B] are those of the requests among all that were run. Where choices are made on
    the GPU, `chosen` are the outputs. See `Result`.
    """

    batch: Batch
    laid_out: BatchInputs
    first: int
    places: tuple[int, ...]
    buffers: PassBuffers
    number: int
    freshness: Freshness
    chosen: Sequence[Outputs] | None = None

    def outputs(self, index: int) -> Outputs:
        """See `Result.outputs`."""
        self.freshness.check(self.number)
        if self.chosen is not None:
            return self.chosen[index]
        rows, place, laid_out = self.batch.rows[index], self.places[index], self.laid_out
        drafts = sum(laid_out.sizes.pseudo_rows)
        start = place * laid_out.logit_count + np.arange(len(rows.logit_rows), dtype=np.int64)
        logits = self.buffers.logits(len(laid_out.pseudo) * laid_out.logit_count)
        draft_logits = self.buffers.drafts(len(laid_out.pseudo) * drafts)
        return HostOutputs(
            rows, _picked(logits, start), PickedRows(draft_logits, place * drafts + laid_out.pseudo[place])
        )


def _picked(rows: LogitRows, index: IntArray) -> LogitRows:
    """Return those rows; of an array, whose rows are neighbours, a part."""
    return rows[index[0] : index[0] + len(index)] if isinstance(rows, np.ndarray) else PickedRows(rows, index)


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
