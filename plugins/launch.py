"""Launching compiled tree attention on the current CUDA device, through the driver."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

from plugins.binaries import COMBINE, COMMIT, COMMIT_ENTRY, Form, Kernel, KernelBinaries, Variant
from plugins.tiling import statistics_count, tile, workspace_bytes

POINTER, NUMBER, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
# Triton appends two pointers to scratch memory, which these kernels do not use.
SCRATCH = ((0, POINTER), (0, POINTER))

Argument = tuple[Any, type]


@dataclass(frozen=True)
class Shapes:
    """B, Hq, Hkv, R, S and D of one call."""

    batch: int
    query_heads: int
    kv_heads: int
    rows: int
    capacity: int
    head_dim: int

    @property
    def packed_rows(self) -> int:
        """G * R, the rows that share a key/value head."""
        return self.query_heads // self.kv_heads * self.rows


@dataclass(frozen=True)
class Buffers:
    """Device addresses of the inputs and the output, as `plugins.reference.tree_attention` names them; no
    `first_visible` where there is no window.
    """

    query: int
    key_new: int
    value_new: int
    key_cache: int
    value_cache: int
    cache_length: int
    tree_mask: int
    output: int
    first_visible: int = 0


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what to run, how many programs, with what."""

    variant: Variant
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Scores:
    """Scores from products of queries and keys: the factor `scale`, and a soft cap where it is not 0."""

    scale: float
    softcap: float = 0.0

    def factors(self) -> tuple[float, float]:
        """Return the kernel's `scale` and `cap`, which are for powers of two."""
        log2e = math.log2(math.e)
        if not self.softcap:
            return self.scale * log2e, 0.0
        return 2 * log2e * self.scale / self.softcap, self.softcap * log2e


def launches(shapes: Shapes, buffers: Buffers, workspace: int, scores: Scores, multiprocessors: int) -> list[Launch]:
    """Return the launches of one tree attention; `workspace` is the address of `workspace_size` bytes."""
    packed = shapes.packed_rows
    plan = tile(shapes.batch, shapes.kv_heads, packed, shapes.capacity, multiprocessors)
    heads = shapes.batch * shapes.kv_heads
    split = plan.splits > 1
    partial = workspace if split else buffers.output
    count = statistics_count(shapes.batch, shapes.kv_heads, packed, plan.splits)
    maxima = workspace + 4 * count * shapes.head_dim if split else 0
    sums = maxima + 4 * count if split else 0
    pointers = (
        buffers.query,
        buffers.key_new,
        buffers.value_new,
        buffers.key_cache,
        buffers.value_cache,
        buffers.cache_length,
        buffers.tree_mask,
        buffers.first_visible,
        partial,
        maxima,
        sums,
    )
    numbers = (shapes.kv_heads, shapes.rows, packed, shapes.capacity)
    attention = Launch(
        Variant(plan.block_m, split, Form(bool(buffers.first_visible), bool(scores.softcap))),
        (plan.row_blocks, heads, plan.splits),
        (
            *((pointer, POINTER) for pointer in pointers),
            *((factor, FLOAT) for factor in scores.factors()),
            *((number, NUMBER) for number in numbers),
            *SCRATCH,
        ),
    )
    if not split:
        return [attention]
    combine = Launch(
        COMBINE,
        (packed, heads, 1),
        (
            *((pointer, POINTER) for pointer in (partial, maxima, sums, buffers.output)),
            (packed, NUMBER),
            (plan.splits, NUMBER),
            *SCRATCH,
        ),
    )
    return [attention, combine]


def workspace_size(shapes: Shapes, multiprocessors: int) -> int:
    """Return the bytes of device memory that a call needs besides its inputs and output."""
    plan = tile(shapes.batch, shapes.kv_heads, shapes.packed_rows, shapes.capacity, multiprocessors)
    return workspace_bytes(shapes.batch, shapes.kv_heads, shapes.packed_rows, shapes.head_dim, plan.splits)


class LoadedKernels:
    """Kernels on the current CUDA device. Raises `ValueError` when they were not compiled for it."""

    def __init__(self, binaries: KernelBinaries) -> None:
        from cuda.bindings import driver

        self._driver = driver
        device = self._check(driver.cuCtxGetDevice())
        attribute = driver.CUdevice_attribute
        major, minor, self.multiprocessors = (
            self._check(driver.cuDeviceGetAttribute(name, device))
            for name in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )
        )
        self._kernels = binaries.for_device(major, minor)
        self._loaded = {variant: self._load(kernel, device) for variant, kernel in self._kernels.items()}

    @property
    def variants(self) -> set[Variant]:
        """The kernels that there are."""
        return set(self._kernels)

    def enqueue(self, launch: Launch, stream: int) -> None:
        """Enqueue one kernel on `stream`."""
        kernel = self._kernels[launch.variant]
        values, types = zip(*launch.arguments, strict=True)
        block = (kernel.threads, 1, 1)
        handle = self._loaded[launch.variant]
        self._check(
            self._driver.cuLaunchKernel(handle, *launch.grid, *block, kernel.shared_memory, stream, (values, types), 0)
        )

    def _load(self, kernel: Kernel, device: Any) -> Any:
        driver = self._driver
        library = self._check(driver.cuLibraryLoadData(kernel.cubin, None, None, 0, None, None, 0))
        handle = self._check(driver.cuLibraryGetKernel(library, kernel.entry.encode()))
        shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._check(driver.cuKernelSetAttribute(shared, kernel.shared_memory, handle, device))
        return self._check(driver.cuKernelGetFunction(handle))

    def _check(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if error != self._driver.CUresult.CUDA_SUCCESS:
            _, name = self._driver.cuGetErrorName(error)
            raise RuntimeError(f"the CUDA driver says {name.decode() if name else error}")
        return values[0] if len(values) == 1 else values


class Launcher:
    """Tree attention on the current CUDA device. Raises `ValueError` when it was not compiled for that."""

    def __init__(self, binaries: KernelBinaries) -> None:
        self._kernels = LoadedKernels(binaries)
        self.multiprocessors = self._kernels.multiprocessors

    def __call__(self, shapes: Shapes, buffers: Buffers, workspace: int, scores: Scores, stream: int) -> None:
        """Enqueue one tree attention on `stream`."""
        for launch in launches(shapes, buffers, workspace, scores, self.multiprocessors):
            self._kernels.enqueue(launch, stream)


@dataclass(frozen=True)
class Commit:
    """The commit of the accepted rows of all B requests of a pass, as `commit_rows_kernel` names what it takes.

    Device addresses of `sources` [N], `targets` [N] and `source_rows` [N], of `lengths` [B], `accepted` [B, most] and
    `counts` [B]. The requests are in places of caches of S = `capacity` rows, one after the other from `first` on.
    """

    sources: int
    targets: int
    source_rows: int
    lengths: int
    accepted: int
    counts: int
    arrays: int
    batch: int
    kv_heads: int
    first: int
    most: int
    capacity: int


class CommitLauncher:
    """The copy of accepted rows into the cache, on the current CUDA device. Raises `ValueError` when it was not
    compiled for that, or by an earlier release.
    """

    def __init__(self, binaries: KernelBinaries) -> None:
        for kernels in binaries.kernels.values():
            if COMMIT not in kernels or kernels[COMMIT].entry != COMMIT_ENTRY:
                raise ValueError(
                    "its kernels are of an earlier release, which committed one request at a time; export it again"
                )
        self._kernels = LoadedKernels(binaries)

    def __call__(self, commit: Commit, stream: int) -> None:
        """Enqueue a commit on `stream`."""
        self._kernels.enqueue(commit_launch(commit), stream)


def commit_launch(commit: Commit) -> Launch:
    """Return the one launch of a commit, in which some request accepts a row."""
    pointers = (
        commit.sources,
        commit.targets,
        commit.source_rows,
        commit.lengths,
        commit.accepted,
        commit.counts,
    )
    return Launch(
        COMMIT,
        (commit.batch * commit.most, commit.kv_heads, commit.arrays),
        (
            *((pointer, POINTER) for pointer in pointers),
            *((number, NUMBER) for number in (commit.first, commit.most, commit.capacity)),
            *SCRATCH,
        ),
    )
