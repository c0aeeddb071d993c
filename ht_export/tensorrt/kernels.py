"""The kernels that a plan carries: which ones, and their compilation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ht_export.tensorrt.limits import Profile
from plugins.binaries import CHOOSE_DRAFTS, Form, KernelBinaries
from plugins.compile_pool import MOST_WORKERS, WORKER_MEMORY, CompilationError, Report, compile_all
from plugins.specialisations import Specialisation, by_architecture, of_attention, of_choices, of_commit
from plugins.tiling import Tile, reachable_tiles
from runtime.bindings import TREE_MASK, GraphDims, key_cache
from runtime.checks import cores
from runtime.errors import InputError
from runtime.memory import available_bytes


@dataclass(frozen=True)
class PlanKernels:
    """Kernels as bytes: those of attention inside the plan, None where it has its own, and those that the runtime runs
    beside it.
    """

    attention: bytes | None
    runtime: bytes


@dataclass(frozen=True)
class Wanted:
    """The kernels that a plan of `dims` carries."""

    dims: GraphDims
    attention: Sequence[Specialisation]
    runtime: Sequence[Specialisation]

    @classmethod
    def of(
        cls,
        dims: GraphDims,
        profiles: Sequence[Profile],
        forms: Collection[Form],
        architectures: tuple[Sequence[int], Sequence[int]],
    ) -> Wanted:
        """Return what a plan with these profiles and `forms` of attention, which may be none, can launch: attention on
        the first of these architectures, all else on the second.
        """
        of_plugin, of_others = architectures
        attention = []
        if forms:
            attention = of_attention(dims.dtype, dims.head_dim, of_plugin, forms, _tiles(dims, profiles))
        runtime = of_commit(dims.dtype, dims.head_dim, of_others) + of_choices(dims.vocab_size, of_others)
        if dims.draft_size is not None:
            runtime += of_choices(dims.draft_size, of_others, CHOOSE_DRAFTS)
        return cls(dims, attention, runtime)

    def compile(self, report: Report) -> PlanKernels:
        """Compile them, with as many processes as there are cores and memory for. Raises `InputError`."""
        try:
            compiled = compile_all([*self.attention, *self.runtime], kernel_workers(), report)
        except CompilationError as error:
            raise InputError(f"compiling kernels: {error}; free some memory, or install another Triton") from error
        attention, runtime = (
            KernelBinaries(self.dims.dtype, self.dims.head_dim, by_architecture(wanted, compiled)).to_bytes()
            for wanted in (self.attention, self.runtime)
        )
        return PlanKernels(attention if self.attention else None, runtime)


def kernel_workers() -> int:
    """Return how many processes may compile at a time: by the cores and the memory of this machine."""
    return max(1, min(cores(), MOST_WORKERS, available_bytes() // WORKER_MEMORY))


def _tiles(dims: GraphDims, profiles: Sequence[Profile]) -> list[Tile]:
    """Return what the attention of any layer may be launched as, of a plan with these profiles."""
    most = [profile.shapes for profile in profiles]
    rows = max(shapes[TREE_MASK][-1][1] for shapes in most)
    capacity = max(shapes[key_cache(0)][-1][2] for shapes in most)
    return reachable_tiles(dims.query_heads // dims.key_value_heads, dims.key_value_heads, rows, capacity)
