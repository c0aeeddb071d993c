"""The exported ONNX graph in ONNX Runtime, on an NVIDIA GPU.

As with a plan, the cache and everything large stay on the GPU; the graph reads and writes them at their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.bindings import GraphDims
from runtime.bundle.engine_file import Limits
from runtime.engines.buffers import DeviceResult, PassBuffers
from runtime.engines.cuda import Cuda
from runtime.engines.device_cache import CacheMemory, DeviceCache, DeviceCacheEngine, cache_of
from runtime.engines.external_weights import GraphFiles
from runtime.engines.layout import stack
from runtime.engines.onnxruntime import Provider, check_bindings, open_session, path_of, running
from runtime.engines.protocol import Batch, Freshness, Result
from runtime.errors import InputError
from runtime.rows import Phase
from runtime.tree import TreeSizes

PROVIDER = "CUDAExecutionProvider"
# The number of the type in `onnx.TensorProto`.
BFLOAT16 = 16
# There are buffers for trees of this many rows, or of the engine's own if those are more.
MAX_ROWS = 64


class OnnxRuntimeCudaEngine(DeviceCacheEngine):
    """An ONNX Runtime session on NVIDIA GPU number `gpu`. `tree` are the engine's usual sizes, `chunk` the prompt
    tokens of a pass. Raises `InputError` where there is no GPU, or no ONNX Runtime that can use it.
    """

    # The device whose memory the graph's inputs and outputs are in, as ONNX Runtime calls it.
    device = "cuda"
    max_batch = 1
    max_slots = 1

    def __init__(
        self,
        graph: Path | GraphFiles,
        dims: GraphDims,
        tree: TreeSizes,
        chunk: int,
        max_context: int,
        *,
        gpu: int = 0,
    ) -> None:
        self.dims = dims
        self._path = path_of(graph)
        self._limits = Limits(1, max_context, max(MAX_ROWS, tree.tree_rows), chunk)
        provider = _provider()
        self._gpu = gpu
        self._cuda = Cuda(gpu)
        # All work on one stream, in order. TF32 would round what is multiplied to 10 bits.
        options = {"device_id": str(gpu), "user_compute_stream": str(self._cuda.stream), "use_tf32": "0"}
        providers: list[Provider] = [(provider, options), "CPUExecutionProvider"]
        self._session = open_session(graph, providers)
        check_bindings(self._session, self._path, dims.inputs(), dims.outputs())
        if self._session.get_providers()[0] != provider:
            raise InputError(
                "ONNX Runtime cannot use the GPU: its CUDA libraries did not load; install CUDA 12 and cuDNN 9, for "
                "example with pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        self._buffers = PassBuffers(self._cuda, dims, self._limits)
        self._freshness = Freshness()
        self._cache_memory = CacheMemory(self._cuda, dims, self._limits.capacity)

    def run(self, batch: Batch) -> DeviceResult:
        """See `Engine.run`. Raises `InputError` for more rows than there are buffers for."""
        self._cuda.use()
        (slot,) = batch.slots
        cache = cache_of(slot)
        laid_out = stack(batch.rows, batch.lengths, self.dims.join_order)
        sizes = laid_out.sizes
        most = self._limits.chunk if batch.phase is Phase.PROMPT else self._limits.max_rows
        if (rows := max(sizes.tree_rows, *sizes.pseudo_rows)) > most:
            raise InputError(f"a pass of {rows} rows; this engine takes at most {most}, use fewer")
        number = self._freshness.next_pass()
        self._buffers.write(laid_out)
        self._buffers.upload()
        values = laid_out.dims(cache.capacity)
        addresses = self._buffers.addresses(cache)
        binding = self._session.io_binding()
        for value in self.dims.inputs():
            where = (self.device, self._gpu, _element(value.dtype), value.sizes(values), addresses[value.name])
            binding.bind_input(value.name, *where)
        for value in self.dims.outputs():
            where = (self.device, self._gpu, _element(value.dtype), value.sizes(values), addresses[value.name])
            binding.bind_output(value.name, *where)
        with running(self._path):
            self._session.run_with_iobinding(binding)
        self._buffers.download_logits(laid_out.logit_count)
        self._cuda.synchronise()
        logits = self._buffers.logits(laid_out.logit_count)
        return DeviceResult(batch, self._buffers, sizes, logits, laid_out.pseudo[0], number, self._freshness)

    def commit(self, result: Result, accepted: Sequence[Sequence[int]]) -> None:
        """See `Engine.commit`: copies the accepted rows behind those of the cache."""
        assert isinstance(result, DeviceResult), "a result of another engine"
        self._freshness.commit(result.number)
        self._cuda.use()
        for slot, rows in zip(result.batch.slots, accepted, strict=True):
            cache = cache_of(slot)
            if not rows:
                continue
            cache.reserve(len(rows))
            self._copy(cache, result.sizes, rows)
            cache.length += len(rows)

    def _copy(self, cache: DeviceCache, sizes: TreeSizes, rows: Sequence[int]) -> None:
        row = self._cache_memory.row_bytes
        for layer in range(self.dims.num_layers):
            pitch = self._buffers.rows_alive(sizes, layer) * row
            for source, target in zip(self._buffers.new(layer), cache.addresses(layer), strict=True):
                end = target + cache.length * row
                for first, count in _runs(rows):
                    self._cuda.copy_rows(
                        end, cache.capacity * row, source + first * row, pitch, count * row, self.dims.key_value_heads
                    )
                    end += count * row


def _provider() -> str:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            "ONNX Runtime is not installed; install it with: pip install 'hidden-transfer[cuda]'"
        ) from error
    if PROVIDER not in onnxruntime.get_available_providers():
        raise InputError(
            "this ONNX Runtime is for the CPU only; install the one for GPUs in its place: pip uninstall onnxruntime "
            "onnxruntime-gpu, then pip install 'hidden-transfer[cuda]'"
        )
    if hasattr(onnxruntime, "preload_dlls"):
        # CUDA and cuDNN as pip packages are on no search path.
        onnxruntime.preload_dlls()
    return PROVIDER


def _element(dtype: str) -> np.dtype | int:
    """Return a binding's type; for bfloat16, which numpy does not know, the number that ONNX has for it."""
    return BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first row and the length of each run of consecutive rows, in order."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return runs
