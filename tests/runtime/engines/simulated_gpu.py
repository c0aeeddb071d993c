"""A CUDA driver and a TensorRT that run on the CPU, strictly, to test what drives them without a GPU.

Device memory is host memory, and every access must lie within one allocation; what was freed has no address again, is
not a number, and cannot be used, by a captured graph either. Work on a stream is done when the stream
is synchronised and not before, so that a copy from a buffer overwritten too early, or a result read too early, shows.
Calls are checked against the signatures of the real `cuda.bindings`. A "plan" is a file with the path of an ONNX graph,
which ONNX Runtime runs on what lies at the addresses that the context was given.
"""

from __future__ import annotations

import ctypes
import inspect
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda.bindings import driver as real
from numpy.typing import NDArray

from runtime.bindings import BYTES, GraphDims
from runtime.bundle.engine_file import PlanFile
from runtime.engines.onnxruntime import open_session
from tests.runtime.engines import simulated_choices

Work = Callable[[], None]


class SimulatedDriver:
    """The part of `cuda.bindings.driver` that the runtime uses. `downloaded` are the bytes copied to the host."""

    def __init__(self, dims: GraphDims, capability: tuple[int, int] = (8, 0), memory: int = 1 << 34) -> None:
        self._dims = dims
        self._capability = capability
        self._memory = memory
        self._allocations: dict[int, Any] = {}
        self._freed: list[Any] = []
        self._pinned: dict[int, Any] = {}
        self._queue: list[Work] = []
        self._captured: list[Work] | None = None
        self._graphs: dict[int, list[Work]] = {}
        self._handles = itertools.count(1)
        self.launched_graphs = 0
        self.downloaded = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(real, name)
        if not name.startswith("cu") or inspect.isclass(found):
            return found
        do = object.__getattribute__(self, f"_{name}")
        signature = inspect.signature(found)

        def call(*arguments: Any) -> tuple[Any, ...]:
            signature.bind(*arguments)
            try:
                result = do(*arguments)
            except MemoryError:
                return (real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
            values = () if result is None else result if isinstance(result, tuple) else (result,)
            return (real.CUresult.CUDA_SUCCESS, *values)

        return call

    @property
    def capturing(self) -> bool:
        return self._captured is not None

    def enqueue(self, work: Work) -> None:
        (self._queue if self._captured is None else self._captured).append(work)

    def at(self, address: int, size: int) -> NDArray[np.uint8]:
        """Return `size` bytes of device memory."""
        return _within(self._allocations, address, size)

    def _cuInit(self, flags: int) -> None:
        pass

    def _cuDeviceGetCount(self) -> int:
        return 1

    def _cuDeviceGet(self, ordinal: int) -> int:
        return ordinal

    def _cuDeviceGetName(self, length: int, device: int) -> bytes:
        return b"Simulated GPU\0".ljust(length, b"\0")

    def _cuDeviceGetAttribute(self, name: Any, device: int) -> int:
        names = real.CUdevice_attribute
        return {
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self._capability[0],
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self._capability[1],
            names.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: 108,
        }[name]

    def _cuDevicePrimaryCtxRetain(self, device: int) -> int:
        return 1

    def _cuCtxSetCurrent(self, context: int) -> None:
        pass

    def _cuCtxGetDevice(self) -> int:
        return 0

    def _cuGetErrorName(self, error: Any) -> bytes:
        return error.name.encode()

    def _cuMemGetInfo(self) -> tuple[int, int]:
        return self._memory - sum(map(len, self._allocations.values())), self._memory

    def _cuMemAlloc(self, size: int) -> int:
        if size > self._cuMemGetInfo()[0]:
            raise MemoryError
        return _allocate(self._allocations, size)

    def _cuMemFree(self, address: int) -> None:
        assert not self._queue, "memory is freed while work that may use it waits"
        assert not self.capturing, "memory cannot be freed while a stream is captured"
        memory = self._allocations.pop(address)
        memory.fill(0xFF)
        self._freed.append(memory)

    def _cuMemHostAlloc(self, size: int, flags: int) -> int:
        return _allocate(self._pinned, size)

    def _cuMemFreeHost(self, address: int) -> None:
        assert not self._queue, "memory is freed while work that may use it waits"
        del self._pinned[address]

    def _cuMemsetD8Async(self, target: int, value: int, size: int, stream: int) -> None:
        self.enqueue(lambda: self.at(target, size).fill(value))

    def _cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> None:
        self.enqueue(lambda: np.copyto(self.at(target, size), _within(self._pinned, source, size)))

    def _cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> None:
        def work() -> None:
            np.copyto(_within(self._pinned, target, size), self.at(source, size))
            self.downloaded += size

        self.enqueue(work)

    def _cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> None:
        assert target + size <= source or source + size <= target, "a copy onto itself"
        self.enqueue(lambda: np.copyto(self.at(target, size), self.at(source, size)))

    def _cuMemcpy2DAsync(self, copy: Any, stream: int) -> None:
        fields = ("srcDevice", "srcPitch", "dstDevice", "dstPitch", "WidthInBytes", "Height")
        source, source_pitch, target, target_pitch, width, height = (int(getattr(copy, name)) for name in fields)
        assert 0 < width <= min(source_pitch, target_pitch), "rows overlap the next ones"
        sources, targets = (
            [start + row * pitch for row in range(height)]
            for start, pitch in ((source, source_pitch), (target, target_pitch))
        )
        if max(source, target) < min(sources[-1], targets[-1]) + width:
            for one in sources:
                assert all(abs(one - other) >= width for other in targets), "a copy onto itself"

        def work() -> None:
            for one, other in zip(sources, targets, strict=True):
                np.copyto(self.at(other, width), self.at(one, width))

        self.enqueue(work)

    def _cuStreamCreate(self, flags: Any) -> int:
        return 7

    def _cuStreamSynchronize(self, stream: int) -> None:
        assert not self.capturing, "a stream cannot be waited for while it is captured"
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def _cuStreamBeginCapture(self, stream: int, mode: Any) -> None:
        self._captured = []

    def _cuStreamEndCapture(self, stream: int) -> list[Work]:
        captured, self._captured = self._captured, None
        assert captured is not None
        return captured

    def _cuGraphInstantiate(self, graph: list[Work], flags: int) -> int:
        # No handle comes twice: a graph that was freed is none.
        handle = next(self._handles)
        self._graphs[handle] = graph
        return handle

    def _cuGraphDestroy(self, graph: list[Work]) -> None:
        pass

    def _cuGraphLaunch(self, graph: int, stream: int) -> None:
        self.launched_graphs += 1
        self._queue.extend(self._graphs[graph])

    def _cuGraphExecDestroy(self, graph: int) -> None:
        del self._graphs[graph]

    def _cuLibraryLoadData(self, code: bytes, *options: Any) -> int:
        assert code.startswith(b"\x7fELF")
        return 1

    def _cuLibraryGetKernel(self, library: int, name: bytes) -> bytes:
        return name

    def _cuKernelSetAttribute(self, attribute: Any, value: int, kernel: bytes, device: int) -> None:
        pass

    def _cuKernelGetFunction(self, kernel: bytes) -> bytes:
        return kernel

    def _cuLaunchKernel(self, function: bytes, *launch: Any) -> None:
        grid = launch[:3]
        assert min(grid) > 0, "CUDA refuses a grid without blocks"
        # As the bindings put arguments into memory.
        for value, kind in zip(*launch[8], strict=True):
            assert isinstance(value, int) if kind is ctypes.c_void_p else kind(value) is not None
        arguments = launch[8][0]
        if function == b"commit_rows_kernel":
            self._commit(grid, arguments)
        else:
            assert function in simulated_choices.KERNELS
            self.enqueue(lambda: simulated_choices.execute(function, self.at, grid, arguments))

    def _commit(self, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        blocks, heads, arrays = grid
        assert heads == self._dims.key_value_heads
        *pointers, first, most, capacity = arguments[:9]
        sources, targets, source_rows, lengths, accepted, counts = pointers
        assert all(pointer % 16 == 0 for pointer in pointers), "the kernel was compiled for aligned pointers"
        batch = blocks // most
        width = self._dims.head_dim * BYTES[self._dims.dtype]

        def work() -> None:
            chosen = self.at(accepted, 4 * batch * most).view(np.int32).reshape(batch, most)
            ends = self.at(lengths, 8 * batch).view(np.int64).tolist()
            numbers = self.at(counts, 4 * batch).view(np.int32).tolist()
            for array in range(arrays):
                source = int(self.at(sources + 8 * array, 8).view(np.int64)[0])
                target = int(self.at(targets + 8 * array, 8).view(np.int64)[0])
                pitch = int(self.at(source_rows + 4 * array, 4).view(np.int32)[0])
                for request, head in itertools.product(range(batch), range(heads)):
                    for index, row in enumerate(chosen[request, : numbers[request]].tolist()):
                        place = (first + request) * heads + head
                        assert 0 <= row < pitch, "a row that the pass did not have"
                        assert 0 <= ends[request] + index < capacity, "a row behind the last of its place"
                        copied = self.at(source + ((request * heads + head) * pitch + row) * width, width)
                        np.copyto(self.at(target + (place * capacity + ends[request] + index) * width, width), copied)

        self.enqueue(work)


def simulated_tensorrt(driver: SimulatedDriver, dims: GraphDims, about: PlanFile) -> Any:
    """Return what the module of the plan's product offers, as far as the runtime uses it."""

    class Logger:
        ERROR = 1

        def __init__(self) -> None:
            pass

    class Context:
        def __init__(self, graph: Path) -> None:
            self._session = _session(graph)
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._ran_with: dict[str, tuple[int, ...]] | None = None

        def set_device_memory(self, address: int, size: int) -> None:
            driver.at(address, size)

        def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
            self._profile = list(about.profiles.values())[profile]
            return stream == 7

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            least, _, most = self._profile[name]
            self._shapes[name] = shape
            return all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            return address % 256 == 0

        def is_stream_capturable(self, stream: int) -> bool:
            return True

        def execute_async_v3(self, stream: int) -> bool:
            assert stream == 7
            assert not driver.capturing or self._ran_with == self._shapes, "not run with these shapes before"
            self._ran_with = dict(self._shapes)
            shapes, addresses = dict(self._shapes), dict(self._addresses)
            driver.enqueue(lambda: self._work(shapes, addresses))
            return True

        def _work(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
            feed = {}
            for binding in dims.inputs():
                element = np.dtype(binding.dtype)
                size = int(np.prod(shapes[binding.name])) * element.itemsize
                found = driver.at(addresses[binding.name], size)
                feed[binding.name] = found.view(element).reshape(shapes[binding.name])
            # The engine reads only the valid rows of a cache: what lies behind them may be anything.
            names = [binding.name for binding in dims.outputs()]
            for name, value in zip(names, self._session.run(names, feed), strict=True):
                np.copyto(driver.at(addresses[name], value.nbytes), value.reshape(-1).view(np.uint8))

    class Engine:
        device_memory_size_v2 = 4096

        def __init__(self, graph: Path) -> None:
            self._graph = graph

        def create_runtime_config(self) -> Any:
            return RuntimeConfig()

        def create_execution_context(self, config: Any) -> Context:
            return Context(self._graph)

        def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
            return list(about.profiles.values())[profile][name]

    class Runtime:
        def __init__(self, log: Any) -> None:
            self._log = log

        def get_engine_validity(self, plan: Any) -> tuple[int, int]:
            return (0, 0) if bytes(plan[:1]) == b"/" else (2, 32)

        def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
            return Engine(Path(bytes(plan).decode()))

    class RuntimeConfig:
        def set_execution_context_allocation_strategy(self, strategy: int) -> None:
            pass

        def create_runtime_cache(self) -> Any:
            return RuntimeCache()

        def set_runtime_cache(self, cache: Any) -> bool:
            return True

    class RuntimeCache:
        def serialize(self) -> bytes:
            return b"compiled"

        def deserialize(self, data: bytes) -> bool:
            return data == b"compiled"

    return SimpleNamespace(
        __name__="tensorrt_rtx",
        __version__=about.version,
        ILogger=Logger,
        Runtime=Runtime,
        EngineValidity=SimpleNamespace(INVALID=2),
        EngineInvalidityDiagnostics=SimpleNamespace(MALFORMED_ENGINE=32, UNSUPPORTED_CC=2),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER=1, LAZY=0),
    )


@cache
def _session(graph: Path) -> Any:
    return open_session(graph, ["CPUExecutionProvider"], threads=1)


def _allocate(held: dict[int, Any], size: int) -> int:
    # Device memory starts at multiples of 256, and holds anything.
    memory = np.full(size + 512, 0xAB, dtype=np.uint8)
    start = -memory.ctypes.data % 256
    aligned = memory[start : start + size]
    held[aligned.ctypes.data] = aligned
    return aligned.ctypes.data


def _within(held: dict[int, Any], address: int, size: int) -> NDArray[np.uint8]:
    for start, memory in held.items():
        if start <= address and address + size <= start + len(memory):
            return memory[address - start : address - start + size]
    raise AssertionError(f"{size} bytes at {address:#x} are in no allocation")
