"""Torch on the stream and in the memory of an engine that drives a GPU itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from runtime.engines.cuda import Cuda

# Types as arrays on a GPU are described, which knows no bfloat16.
TYPES = {"int64": "<i8", "bool": "|b1", "float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}


class StreamDevice(Protocol):
    """Where torch works for an engine."""

    def tensor_at(self, address: int, shape: Sequence[int], dtype: str) -> Any:
        """Return the tensor of this shape and type that lies at a place in the device's memory."""
        ...

    def launch(self, work: Callable[[], None]) -> None:
        """Enqueue what `work` has torch compute on the engine's stream."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what enqueues a CUDA graph of `work`. Raises `RuntimeError` where that cannot be captured."""
        ...


class TorchDevice:
    """A GPU; see `StreamDevice`."""

    def __init__(self, cuda: Cuda) -> None:
        import torch

        self._stream = torch.cuda.ExternalStream(cuda.stream)

    def tensor_at(self, address: int, shape: Sequence[int], dtype: str) -> Any:
        """See `StreamDevice.tensor_at`."""
        import torch

        if not all(shape):
            return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="cuda")
        described = {"shape": tuple(shape), "typestr": TYPES[dtype], "data": (address, False), "version": 2}
        tensor = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=described), device="cuda")
        assert tensor.data_ptr() == address, "a copy of what lies there"
        return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor

    def launch(self, work: Callable[[], None]) -> None:
        """See `StreamDevice.launch`."""
        import torch

        with torch.no_grad(), torch.cuda.stream(self._stream):
            work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `StreamDevice.capture`."""
        import torch

        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            torch.no_grad(),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            work()
        return lambda: self.launch(graph.replay)
