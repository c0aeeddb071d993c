"""What engines have in common whose passes of decoding are brought to few shapes, each of which is captured as a CUDA
graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from plugins.launch import CommitLauncher
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import Limits
from runtime.engines.buffers import DeviceResult
from runtime.engines.cuda import Cuda
from runtime.engines.device_cache import in_places
from runtime.engines.device_engine import DeviceEngine
from runtime.engines.layout import BatchInputs, bucket
from runtime.engines.protocol import Batch
from runtime.rows import Phase
from runtime.tree import TreeSizes

# Shapes that are held with what runs them and a graph, each of which takes some memory: a few sizes of trees, times six
# capacities or numbers of requests that are in use for a time.
MOST_PASSES = 32

# A pass of one shape, as an engine has it.
Held = TypeVar("Held")


class CapturingEngine(DeviceEngine, Generic[Held]):
    """A `DeviceEngine` that commits by `commit`; `usual` are the sizes of most passes. Prompts have no graph.

    `refused` counts the shapes that came again and could not be captured.
    """

    def __init__(
        self,
        cuda: Cuda,
        dims: GraphDims,
        limits: Limits,
        memory_bytes: int | None,
        share: tuple[int, int],
        usual: TreeSizes,
        commit: CommitLauncher,
    ) -> None:
        super().__init__(cuda, dims, limits, memory_bytes, share)
        self._usual = usual
        self._commit = commit
        # The least recently used first.
        self._passes: OrderedDict[tuple[int, ...], Held] = OrderedDict()
        self._passes_of = self._addressed
        self.refused = 0

    @property
    def _addressed(self) -> tuple[int, int]:
        """What the addresses of passes follow from: graphs hold for one such pair alone."""
        return self._buffers.generation, self.cache.generation

    def _places(self, batch: Batch) -> tuple[int, bool]:
        # Prompts have no graph, whose addresses must stay: one of them may be wherever it is.
        together = len(batch) > 1 or batch.phase is Phase.DECODE
        return in_places(len(batch), self.max_batch), together

    def _sizes(self, batch: Batch) -> TreeSizes | None:
        if batch.phase is Phase.PROMPT:
            return None
        return bucket(batch.rows, self._usual, self._limits.max_rows)

    def _pass(self, laid_out: BatchInputs, make: Callable[[], Held]) -> Held:
        """Return the pass of this shape, which `make` makes where none is held."""
        if self._passes_of != self._addressed:
            # Memory that they read or write is somewhere else now.
            self._passes.clear()
            self._passes_of = self._addressed
        sizes = laid_out.sizes
        key = (len(laid_out.pseudo), sizes.tree_rows, *sizes.pseudo_rows, self.cache.capacity)
        if key in self._passes:
            self._passes.move_to_end(key)
            return self._passes[key]
        while len(self._passes) >= MOST_PASSES:
            self._passes.popitem(last=False)
        found = self._passes[key] = make()
        return found

    def _commit_rows(self, result: DeviceResult, accepted: Sequence[Sequence[int]]) -> None:
        commit = self._buffers.commit(self.cache, result.first, result.laid_out.sizes, accepted)
        self._commit(commit, self._cuda.stream)
