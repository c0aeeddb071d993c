"""The part of the CUDA driver that engines on a GPU need: memory, a stream, copies and graphs."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

HINT = "pip install 'cuda-bindings>=12.8,<14'"


class DeviceMemoryError(InputError):
    """There is too little memory on the GPU."""


class Cuda:
    """The primary context of one GPU, and a stream of its own. Raises `InputError` where there is none."""

    def __init__(self, device: int = 0) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise InputError(f"cuda-bindings is not installed; install it with: {HINT}") from error
        self.driver = driver
        try:
            self.check(driver.cuInit(0))
            count = self.check(driver.cuDeviceGetCount())
        except (InputError, RuntimeError) as error:
            raise InputError(
                f"no NVIDIA GPU can be used ({error}); this engine needs one and its driver, unlike .onnx engines on "
                "the CPU"
            ) from error
        if device >= count:
            raise InputError(f"there is no GPU {device}; this machine has {count}")
        self.device = self.check(driver.cuDeviceGet(device))
        self._context = self.check(driver.cuDevicePrimaryCtxRetain(self.device))
        self.check(driver.cuCtxSetCurrent(self._context))
        # Not the default stream, which cannot be captured.
        self.stream = int(self.check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    @property
    def capability(self) -> tuple[int, int]:
        """The GPU's compute capability."""
        names = self.driver.CUdevice_attribute
        major = self._attribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        return major, self._attribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)

    @property
    def name(self) -> str:
        """The GPU's name."""
        return self.check(self.driver.cuDeviceGetName(128, self.device)).split(b"\0")[0].decode()

    def free_memory(self) -> int:
        """Return the bytes of device memory that are free."""
        return int(self.check(self.driver.cuMemGetInfo())[0])

    def use(self) -> None:
        """Make this context the calling thread's."""
        self.check(self.driver.cuCtxSetCurrent(self._context))

    def allocate(self, size: int) -> DeviceMemory:
        """Return `size` bytes of device memory, all zero. Raises `DeviceMemoryError` when there is too little."""
        try:
            address = int(self.check(self.driver.cuMemAlloc(max(size, 1))))
        except RuntimeError as error:
            raise DeviceMemoryError(
                f"the GPU has too little memory: {size >> 20} MiB are needed and {self.free_memory() >> 20} MiB are "
                f"free ({error}); give a lower gpu_memory_bytes or max_batch, end other programs that use the GPU, or "
                "use a larger one"
            ) from error
        self.clear(address, max(size, 1))
        return DeviceMemory(self, address, size)

    def clear(self, address: int, size: int) -> None:
        """Enqueue that `size` bytes of device memory become zero."""
        self.check(self.driver.cuMemsetD8Async(address, 0, size, self.stream))

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Return `size` bytes of host memory that the device copies to and from directly."""
        address = int(self.check(self.driver.cuMemHostAlloc(max(size, 1), 0)))
        held = (ctypes.c_uint8 * size).from_address(address)
        # Views of the array hold on to `held`, not to the array.
        weakref.finalize(held, _free_pinned, self.driver, self.stream, address)
        return np.ctypeslib.as_array(held)

    def upload(self, target: int, source: NDArray, size: int | None = None) -> None:
        """Enqueue a copy of pinned host memory to the device."""
        self.check(self.driver.cuMemcpyHtoDAsync(target, source.ctypes.data, size or source.nbytes, self.stream))

    def download(self, target: NDArray, source: int, size: int | None = None) -> None:
        """Enqueue a copy of device memory to pinned host memory."""
        self.check(self.driver.cuMemcpyDtoHAsync(target.ctypes.data, source, size or target.nbytes, self.stream))

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy of `size` bytes on the device, between places that do not overlap."""
        self.check(self.driver.cuMemcpyDtoDAsync(target, source, size, self.stream))

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        """Enqueue a copy of `height` rows of `width` bytes, whose beginnings are a pitch apart, on the device."""
        if not width:
            return
        kind = self.driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy = self.driver.CUDA_MEMCPY2D()
        copy.srcMemoryType, copy.dstMemoryType = kind, kind
        copy.srcDevice, copy.dstDevice = source, target
        copy.srcPitch, copy.dstPitch = source_pitch, target_pitch
        copy.WidthInBytes, copy.Height = width, height
        self.check(self.driver.cuMemcpy2DAsync(copy, self.stream))

    def synchronise(self) -> None:
        """Wait for everything enqueued. Raises `RuntimeError` when some of it failed."""
        self.check(self.driver.cuStreamSynchronize(self.stream))

    def capture(self, work: Callable[[], None]) -> Any:
        """Return a graph of what `work` enqueues. Raises `RuntimeError` when that cannot be captured."""
        driver = self.driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        # Garbage may hold device memory, which cannot be freed meanwhile.
        collecting = gc.isenabled()
        gc.disable()
        try:
            self.check(driver.cuStreamBeginCapture(self.stream, mode))
            try:
                work()
            except BaseException:
                driver.cuStreamEndCapture(self.stream)
                raise
            graph = self.check(driver.cuStreamEndCapture(self.stream))
        finally:
            if collecting:
                gc.enable()
        executable = self.check(driver.cuGraphInstantiate(graph, 0))
        self.check(driver.cuGraphDestroy(graph))
        return executable

    def replay(self, graph: Any) -> None:
        """Enqueue a captured graph."""
        self.check(self.driver.cuGraphLaunch(graph, self.stream))

    def forget(self, graph: Any) -> None:
        """Free a captured graph."""
        self.check(self.driver.cuGraphExecDestroy(graph))

    def check(self, result: tuple[Any, ...]) -> Any:
        """Return the values of a driver call. Raises `RuntimeError` with the driver's name for what went wrong."""
        error, *values = result
        if error != self.driver.CUresult.CUDA_SUCCESS:
            _, name = self.driver.cuGetErrorName(error)
            raise RuntimeError(name.decode() if name else f"CUDA error {int(error)}")
        return values[0] if len(values) == 1 else values

    def _attribute(self, name: Any) -> int:
        return int(self.check(self.driver.cuDeviceGetAttribute(name, self.device)))


def _free_pinned(driver: Any, stream: int, address: int) -> None:
    # Work that is enqueued, such as the last commit of a text, may still copy from it.
    driver.cuStreamSynchronize(stream)
    driver.cuMemFreeHost(address)


class DeviceMemory:
    """An allocation that is freed with its object."""

    def __init__(self, cuda: Cuda, address: int, size: int) -> None:
        self._cuda = cuda
        self.address = address
        self.size = size

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            # Work that is enqueued, such as the last commit of a text, may still use it.
            self._cuda.driver.cuStreamSynchronize(self._cuda.stream)
            self._cuda.driver.cuMemFree(self.address)
