"""Where the inputs and outputs of passes on a GPU are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plugins.launch import CommitTable
from runtime import bindings
from runtime.arrays import IntArray
from runtime.bindings import BYTES, GraphDims, dynamic_dims
from runtime.bundle.engine_file import Limits
from runtime.engines.cuda import Cuda
from runtime.engines.device_cache import DeviceCache
from runtime.engines.layout import BatchInputs
from runtime.engines.protocol import Batch, Freshness
from runtime.rows import HostOutputs, Outputs, PickedRows
from runtime.tree import TreeSizes

ALIGNMENT = 256


class PassBuffers:
    """The inputs of a pass but for the cache, in one block of pinned memory and one on the device; and its outputs.

    `limits` are those of the plan.
    """

    def __init__(self, cuda: Cuda, dims: GraphDims, limits: Limits) -> None:
        self._cuda = cuda
        self._dims = dims
        steps = dims.num_steps
        # A prompt chunk drafts at its last row only.
        most = max(limits.max_rows * (1 + steps), limits.chunk + steps)
        tree_rows = max(limits.max_rows, limits.chunk)
        largest = dynamic_dims(tree_rows, (limits.max_rows,) * steps, limits.max_rows, 0) | {"R": most}
        self._offsets: dict[str, int] = {}
        end = 0
        # The mask last: it is the largest by far, and a small pass sends its beginning alone.
        for binding in sorted(dims.inputs(), key=lambda binding: binding.name == bindings.TREE_MASK):
            if not binding.name.startswith(bindings.CACHE_PREFIXES):
                self._offsets[binding.name] = end
                end += _align(math.prod(binding.sizes(largest)) * (1 if binding.dtype == "bool" else 8))
        self._used = end
        self._host = cuda.pinned(end)
        self._device = cuda.allocate(end)
        self._new_size = _align(dims.key_value_heads * most * dims.head_dim * BYTES[dims.dtype])
        self._new = cuda.allocate(2 * dims.num_layers * self._new_size)
        row = 4 * dims.vocab_size
        self._logits_host = cuda.pinned(limits.max_rows * row)
        self._logits = cuda.allocate(limits.max_rows * row)
        self._drafts_host = cuda.pinned(row)
        self._drafts = cuda.allocate(max(1, limits.max_rows * steps) * row)
        self._accepted_host = cuda.pinned(4 * tree_rows)
        self._accepted = cuda.allocate(4 * tree_rows)
        self._table_host = cuda.pinned(2 * dims.num_layers * (8 + 8 + 4))
        self._table = cuda.allocate(len(self._table_host))
        self._table_of: tuple[int, ...] = ()

    def addresses(self, cache: DeviceCache) -> dict[str, int]:
        """Return the device address of every input and output, `cache`'s among them."""
        found = {name: self._device.address + offset for name, offset in self._offsets.items()}
        for layer in range(self._dims.num_layers):
            found[bindings.key_cache(layer)], found[bindings.value_cache(layer)] = cache.addresses(layer)
            found[bindings.key_new(layer)], found[bindings.value_new(layer)] = self.new(layer)
        found[bindings.LOGITS] = self._logits.address
        found[bindings.DRAFT_LOGITS] = self._drafts.address
        return found

    @property
    def logit_addresses(self) -> tuple[int, int]:
        """The device addresses of the logits and of the draft logits."""
        return self._logits.address, self._drafts.address

    def new(self, layer: int) -> tuple[int, int]:
        """Return the addresses of the new keys and values [Hkv, R_l, D] of `layer`."""
        start = self._new.address + 2 * layer * self._new_size
        return start, start + self._new_size

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

    def download_logits(self, rows: int) -> None:
        """Enqueue the copy of the first rows of logits to the host."""
        self._cuda.download(self._logits_host, self._logits.address, 4 * rows * self._dims.vocab_size)

    def logits(self, rows: int) -> NDArray[np.float32]:
        """Return the base model's logits [rows, V] of the last pass; the next pass overwrites them."""
        vocab = self._dims.vocab_size
        return self._logits_host.view(np.float32)[: rows * vocab].reshape(rows, vocab)

    def draft(self, row: int) -> NDArray[np.float32]:
        """Fetch the draft logits [V] of one pseudo row of the last pass."""
        self._cuda.download(self._drafts_host, self._drafts.address + row * len(self._drafts_host))
        self._cuda.synchronise()
        return self._drafts_host.view(np.float32).copy()

    def commit_table(self, cache: DeviceCache, accepted: Sequence[int], sizes: TreeSizes) -> CommitTable:
        """Send what the commit of `accepted` rows of a pass of these `sizes` needs; return where it is.

        Sources are the new keys and values of each layer, targets those of `cache`.
        """
        self._accepted_host.view(np.int32)[: len(accepted)] = accepted
        self._cuda.upload(self._accepted.address, self._accepted_host, 4 * len(accepted))
        layers = self._dims.num_layers
        count = 2 * layers
        wanted = (cache.addresses(0)[0], cache.capacity, sizes.tree_rows, *sizes.pseudo_rows)
        # Most steps send the table of the step before.
        if wanted != self._table_of:
            alive = [self.rows_alive(sizes, layer) for layer in range(layers)]
            table = self._table_host
            sources = [address for layer in range(layers) for address in self.new(layer)]
            table[: 8 * count].view(np.int64)[:] = sources
            targets = [address for layer in range(layers) for address in cache.addresses(layer)]
            table[8 * count : 16 * count].view(np.int64)[:] = targets
            table[16 * count :].view(np.int32)[:] = np.repeat(alive, 2)
            self._cuda.upload(self._table.address, table)
            self._table_of = wanted
        start = self._table.address
        return CommitTable(start, start + 8 * count, start + 16 * count, self._accepted.address, count)


class DraftRows:
    """The draft logits of the last pass, each row fetched when it is asked for: only one node's rows ever are."""

    def __init__(self, buffers: PassBuffers, count: int) -> None:
        self._buffers = buffers
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        return self._buffers.draft(row)


@dataclass(frozen=True)
class DeviceResult:
    """Pass `number` on a GPU, of one request, laid out in these `sizes`: logits [M, V] on the host, all else where the
    pass left it; `pseudo` are the rows of the draft logits that are the request's own. Where choices are made on the
    GPU, `chosen` are the outputs, and no logits were fetched. See `Result`.
    """

    batch: Batch
    buffers: PassBuffers
    sizes: TreeSizes
    logits: NDArray[np.float32]
    pseudo: IntArray
    number: int
    freshness: Freshness
    chosen: Sequence[Outputs] | None = None

    def outputs(self, index: int) -> Outputs:
        """See `Result.outputs`."""
        self.freshness.check(self.number)
        if self.chosen is not None:
            return self.chosen[index]
        rows = self.batch.rows[index]
        drafts = DraftRows(self.buffers, sum(self.sizes.pseudo_rows))
        return HostOutputs(rows, self.logits[: len(rows.logit_rows)], PickedRows(drafts, self.pseudo))


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
