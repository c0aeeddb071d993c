"""Launching compiled choices on the current CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plugins.binaries import CHOOSE, KernelBinaries, Variant
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


def choose_launches(
    buffers: ChooseBuffers,
    jobs: int,
    vocab_size: int,
    tiling: Tiling | None = None,
    variants: Sequence[Variant] = CHOOSE,
) -> list[Launch]:
    """Return the launches that answer `jobs` jobs on rows of V logits, one after the other."""
    tiling = tile(vocab_size) if tiling is None else tiling
    tops, sums, peaks, _ = (buffers.scratch + offset for offset in _offsets(jobs, tiling))
    grid = (tiling.splits, jobs, 1)
    collected = (buffers.jobs, buffers.results, tops, peaks, sums)
    return [
        Launch(variant, grid, (*((p, POINTER) for p in pointers), *((n, NUMBER) for n in numbers), *SCRATCH))
        for variant, (pointers, numbers) in zip(
            variants,
            (
                ((buffers.jobs, buffers.results, tops, peaks), (vocab_size,)),
                ((buffers.jobs, tops, sums), (vocab_size,)),
                (collected, (vocab_size, tiling.groups)),
            ),
            strict=True,
        )
    ]


class ChooseLauncher:
    """Choices on the current CUDA device, by kernels that were compiled for rows of one length."""

    def __init__(self, kernels: LoadedKernels, variants: Sequence[Variant] = CHOOSE) -> None:
        self._kernels = kernels
        self._variants = variants

    @classmethod
    def of(cls, binaries: KernelBinaries, wanted: Sequence[Variant] = CHOOSE) -> ChooseLauncher | None:
        """Return the choices among these kernels, those for whole rows or for draft logits (`CHOOSE_DRAFTS`); None
        where there are none, as in plans of earlier releases.

        Raises `ValueError` when there are no kernels for this device.
        """
        held = {sm: {v: k for v, k in variants.items() if v in wanted} for sm, variants in binaries.kernels.items()}
        kernels = LoadedKernels(KernelBinaries(binaries.dtype, binaries.head_dim, held))
        return cls(kernels, wanted) if kernels.variants >= set(wanted) else None

    def __call__(self, buffers: ChooseBuffers, jobs: int, vocab_size: int, stream: int) -> None:
        """Enqueue the answers to `jobs` jobs on rows of V logits."""
        for launch in choose_launches(buffers, jobs, vocab_size, variants=self._variants):
            self._kernels.enqueue(launch, stream)


def _offsets(jobs: int, tiling: Tiling) -> tuple[int, int, int, int]:
    """Return where tops, sums and peaks begin in the memory between launches, and where that ends."""
    of_blocks, of_groups = _align(4 * jobs * tiling.splits), _align(4 * jobs * tiling.groups)
    return 0, of_blocks, 2 * of_blocks, 2 * of_blocks + of_groups


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
