"""The exported ONNX graph in ONNX Runtime, on an NVIDIA GPU.

As with a plan, the cache and everything large stay on the GPU; the graph reads and writes them at their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.bindings import BYTES, CACHE_LENGTH, GraphDims
from runtime.bundle.engine_file import Limits
from runtime.engines.buffers import DeviceResult
from runtime.engines.cuda import Cuda
from runtime.engines.device_engine import DeviceEngine
from runtime.engines.external_weights import GraphFiles
from runtime.engines.layout import BatchInputs
from runtime.engines.onnxruntime import Provider, check_bindings, open_session, path_of, running
from runtime.engines.protocol import Batch
from runtime.errors import InputError
from runtime.tree import TreeSizes

PROVIDER = "CUDAExecutionProvider"
# The number of the type in `onnx.TensorProto`.
BFLOAT16 = 16
# There are buffers for trees of this many rows, or of the engine's own if those are more.
MAX_ROWS = 64
# Requests of a pass. More of them gain little: a pass of 32 rows reads the weights as a pass of one does, and with
# trees computes for hundreds.
MAX_BATCH = 32
# Of the memory that is free once the weights are there, the share for keys and values: ONNX Runtime takes what it
# computes with out of the rest, as it comes, and more the more requests there are.
SHARE = (1, 2)


class OnnxRuntimeCudaEngine(DeviceEngine):
    """An ONNX Runtime session on NVIDIA GPU number `gpu`. `tree` are the engine's usual sizes, `chunk` the prompt
    tokens of a pass. Keys and values take up to `memory_bytes` of the GPU's memory, None for `SHARE` of what is free.
    Raises `InputError` where there is no GPU, too little memory, or no ONNX Runtime that can use it.
    """

    # The device whose memory the graph's inputs and outputs are in, as ONNX Runtime calls it.
    device = "cuda"

    def __init__(
        self,
        graph: Path | GraphFiles,
        dims: GraphDims,
        tree: TreeSizes,
        chunk: int,
        max_context: int,
        *,
        gpu: int = 0,
        memory_bytes: int | None = None,
    ) -> None:
        self._path = path_of(graph)
        provider = _provider()
        self._gpu = gpu
        cuda = Cuda(gpu)
        # All work on one stream, in order. TF32 would round what is multiplied to 10 bits.
        options = {"device_id": str(gpu), "user_compute_stream": str(cuda.stream), "use_tf32": "0"}
        providers: list[Provider] = [(provider, options), "CPUExecutionProvider"]
        self._session = open_session(graph, providers)
        check_bindings(self._session, self._path, dims.inputs(), dims.outputs())
        if self._session.get_providers()[0] != provider:
            raise InputError(
                "ONNX Runtime cannot use the GPU: its CUDA libraries did not load; install CUDA 12 and cuDNN 9, for "
                "example with pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        limits = Limits(MAX_BATCH, max_context, max(MAX_ROWS, tree.tree_rows), chunk)
        super().__init__(cuda, dims, limits, memory_bytes, SHARE)

    def _places(self, batch: Batch) -> tuple[int, bool]:
        # Without graphs any number of requests does as well as another, and one may be wherever it is.
        return len(batch), len(batch) > 1

    def _sizes(self, batch: Batch) -> None:
        return None

    def _run(self, batch: Batch, laid_out: BatchInputs, first: int) -> None:
        self._buffers.write(laid_out)
        self._buffers.upload()
        values = laid_out.dims(self.cache.capacity)
        addresses = self._buffers.addresses(self.cache, first)
        binding = self._session.io_binding()
        for value in self.dims.inputs():
            where = (self.device, self._gpu, _element(value.dtype), value.sizes(values), addresses[value.name])
            binding.bind_input(value.name, *where)
        for value in self.dims.outputs():
            where = (self.device, self._gpu, _element(value.dtype), value.sizes(values), addresses[value.name])
            binding.bind_output(value.name, *where)
        with running(self._path):
            self._session.run_with_iobinding(binding)

    def _commit_rows(self, result: DeviceResult, accepted: Sequence[Sequence[int]]) -> None:
        """See `DeviceEngine._commit_rows`: by copies, as an engine that is no plan has no kernels with it."""
        dims, sizes = self.dims, result.laid_out.sizes
        row = dims.head_dim * BYTES[dims.dtype]
        heads = dims.key_value_heads
        lengths = result.laid_out.values[CACHE_LENGTH].tolist()
        for layer in range(dims.num_layers):
            alive = self._buffers.rows_alive(sizes, layer) * row
            pitch = self.cache.capacity * row
            for source, target in zip(self._buffers.new(layer), self.cache.addresses(layer, result.first), strict=True):
                for place, rows in enumerate(accepted):
                    end = target + place * heads * pitch + lengths[place] * row
                    for first, count in _runs(rows):
                        start = source + place * heads * alive + first * row
                        self._cuda.copy_rows(end, pitch, start, alive, count * row, heads)
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
