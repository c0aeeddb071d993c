"""Engines: what runs the exported graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.bindings import GraphDims
from runtime.cache import KeyValueCache
from runtime.tree import Rows


@dataclass(frozen=True)
class Outputs:
    """One pass's results for one sequence: logits [M, V]; draft_logits [sum R_k, V] in row order; key_new, value_new
    L arrays [1, Hkv, R_l, D], the tree's rows first.
    """

    logits: NDArray[np.float32]
    draft_logits: NDArray[np.float32]
    key_new: Sequence[NDArray]
    value_new: Sequence[NDArray]


class Engine(Protocol):
    """Something that runs the graph of `dims`."""

    dims: GraphDims

    def run(self, rows: Rows, cache: KeyValueCache) -> Outputs:
        """Run `rows` once over the valid rows of `cache`, which stays as it is."""
        ...
