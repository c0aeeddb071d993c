"""Engines: what runs the exported graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.bindings import GraphDims
from runtime.tree import Rows


class LogitRows(Protocol):
    """Rows of logits, each [V]; an array [N, V] is one, and so are rows that are fetched when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Outputs:
    """One pass's results for one sequence: logits [M, V]; draft_logits [sum R_k, V] in row order; key_new, value_new
    L arrays [1, Hkv, R_l, D], the tree's rows first, where they are on the host.

    They hold until the engine's next pass.
    """

    logits: NDArray[np.float32]
    draft_logits: LogitRows
    key_new: Sequence[NDArray]
    value_new: Sequence[NDArray]


class Cache(Protocol):
    """Keys and values of the accepted rows of one sequence, wherever the engine keeps them."""

    length: int

    def commit(self, outputs: Outputs, rows: Sequence[int]) -> None:
        """Append the keys and values of `rows` of the last pass, whose outputs these are, in that order."""
        ...


class Engine(Protocol):
    """Something that runs the graph of `dims`."""

    dims: GraphDims

    def new_cache(self) -> Any:
        """Return an empty `Cache` of this engine."""
        ...

    def run(self, rows: Rows, cache: Any) -> Outputs:
        """Run `rows` once over the valid rows of `cache`, a `Cache` of this engine, which stay as they are."""
        ...
