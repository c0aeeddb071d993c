"""Launching compiled choices on the current CUDA device."""

from __future__ import annotations

from dataclasses import dataclass

from plugins.binaries import CHOOSE, COLLECT, PEAK, WEIGH, KernelBinaries
from plugins.choosing import Tiling, tile
from plugins.launch import NUMBER, POINTER, SCRATCH, Launch, LoadedKernels

ALIGNMENT = 256


@dataclass(frozen=True)
class ChooseBuffers:
    """Device addresses of the jobs [N], of the results, and of `scratch_bytes` of memory in between."""

    jobs: int
    results: int
    scratch: int


def scratch_bytes(jobs: int, vocab_size: int) -> int:
    """Return the bytes of memory that the kernels need to answer so many jobs on rows of V logits."""
    return _offsets(jobs, tile(vocab_size))[-1]


def choose_launches(buffers: ChooseBuffers, jobs: int, vocab_size: int, tiling: Tiling | None = None) -> list[Launch]:
    """Return the launches that answer `jobs` jobs on rows of V logits, one after the other."""
    tiling = tile(vocab_size) if tiling is None else tiling
    tops, sums, peaks, _ = (buffers.scratch + offset for offset in _offsets(jobs, tiling))
    grid = (tiling.splits, jobs, 1)
    collected = (buffers.jobs, buffers.results, tops, peaks, sums)
    return [
        Launch(variant, grid, (*((p, POINTER) for p in pointers), *((n, NUMBER) for n in numbers), *SCRATCH))
        for variant, pointers, numbers in (
            (PEAK, (buffers.jobs, buffers.results, tops, peaks), (vocab_size,)),
            (WEIGH, (buffers.jobs, tops, sums), (vocab_size,)),
            (COLLECT, collected, (vocab_size, tiling.groups)),
        )
    ]


class ChooseLauncher:
    """Choices on the current CUDA device."""

    def __init__(self, kernels: LoadedKernels) -> None:
        self._kernels = kernels

    @classmethod
    def of(cls, binaries: KernelBinaries) -> ChooseLauncher | None:
        """Return the choices among these kernels, None where they are none, as in plans of earlier releases.

        Raises `ValueError` when there are no kernels for this device.
        """
        held = {sm: {v: k for v, k in variants.items() if v in CHOOSE} for sm, variants in binaries.kernels.items()}
        kernels = LoadedKernels(KernelBinaries(binaries.dtype, binaries.head_dim, held))
        return cls(kernels) if kernels.variants >= set(CHOOSE) else None

    def __call__(self, buffers: ChooseBuffers, jobs: int, vocab_size: int, stream: int) -> None:
        """Enqueue the answers to `jobs` jobs on rows of V logits."""
        for launch in choose_launches(buffers, jobs, vocab_size):
            self._kernels.enqueue(launch, stream)


def _offsets(jobs: int, tiling: Tiling) -> tuple[int, int, int, int]:
    """Return where tops, sums and peaks begin in the memory between launches, and where that ends."""
    of_blocks, of_groups = _align(4 * jobs * tiling.splits), _align(4 * jobs * tiling.groups)
    return 0, of_blocks, 2 * of_blocks, 2 * of_blocks + of_groups


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
