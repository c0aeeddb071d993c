"""One request's part of a pass: the rows that it wants run, and what it gets back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.arrays import IntArray
from runtime.drafting.drafts import DraftStep, most_probable
from runtime.sampling.choice import Choice, Wanted, WholeLogits
from runtime.tree import Tree, chain


class Phase(Enum):
    """The purpose of a pass. Engines may prepare for each in another way, and never guess which one it is."""

    # A chunk of a prompt: tokens without branches, of which the last alone has logits and drafts.
    PROMPT = "prompt"
    # A tree to verify; in plain decoding its root alone.
    DECODE = "decode"


@dataclass(frozen=True)
class Rows:
    """The rows of one request in one pass, without the batch dimension; shapes as in `runtime.bindings`.

    Back come what is `wanted` of each of the M `logit_rows`, and of each pseudo row the `shortlist` most probable
    tokens.
    """

    input_ids: IntArray
    position_ids: IntArray
    tree_mask: NDArray[np.bool_]
    pseudo_parents: tuple[IntArray, ...]
    logit_rows: IntArray
    phase: Phase = Phase.DECODE
    wanted: Wanted = field(default_factory=WholeLogits)
    shortlist: int = 0

    @property
    def counts(self) -> tuple[int, ...]:
        """R_1 to R_K: the pseudo rows of each draft step."""
        return tuple(map(len, self.pseudo_parents))


class LogitRows(Protocol):
    """Rows of logits, each [V]; an array [N, V] is one, and so are rows that are fetched when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> NDArray[np.float32]: ...


class PickedRows:
    """Rows of logits picked from others, in the order of `index`."""

    def __init__(self, rows: LogitRows, index: IntArray) -> None:
        self._rows = rows
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        return self._rows[int(self._index[row])]


class Outputs(Protocol):
    """One request's slice of a pass. It holds as long as the result that it is of."""

    @property
    def rows(self) -> Rows:
        """The rows that were run."""
        ...

    @property
    def logits(self) -> LogitRows:
        """The logits [M, V] of the logit rows, whatever was wanted of them."""
        ...

    @property
    def draft_logits(self) -> LogitRows:
        """The draft logits [sum R_k, V_d], in row order."""
        ...

    def chosen(self, index: int) -> Choice:
        """Return what is wanted of row `logit_rows[index]`, for the token after it."""
        ...

    def draft(self, row: int) -> DraftStep | None:
        """Return the most probable tokens of a pseudo row, as many as the rows ask for, as numbers of its draft logits;
        None where it overflowed: a draft may be bad, not fatal.
        """
        ...


@dataclass(frozen=True)
class HostOutputs:
    """Outputs whose choices are made on the host, when one is asked for: few rows ever are. See `Outputs`."""

    rows: Rows
    logits: LogitRows
    draft_logits: LogitRows

    def chosen(self, index: int) -> Choice:
        """See `Outputs.chosen`."""
        position = int(self.rows.position_ids[self.rows.logit_rows[index]]) + 1
        return self.rows.wanted.choose(self.logits[index], position)

    def draft(self, row: int) -> DraftStep | None:
        """See `Outputs.draft`."""
        logits = self.draft_logits[row]
        return most_probable(logits, self.rows.shortlist) if math.isfinite(logits.max()) else None


ITSELF = np.ones((1, 1), dtype=bool)
FIRST_ROW = np.zeros(1, dtype=np.int64)


def lay_out(
    tree: Tree,
    pseudo_parents: tuple[IntArray, ...],
    join_order: Sequence[int],
    start: int,
    logit_rows: IntArray | None = None,
    *,
    phase: Phase = Phase.DECODE,
    wanted: Wanted | None = None,
    shortlist: int = 0,
) -> Rows:
    """Return the rows of one pass: the tree's nodes, then each step's pseudo rows in `join_order`.

    `start` is the absolute position of the tree's root. A node sees itself and its ancestors; a pseudo row sees what
    its parent sees, itself, and its parent's earlier steps. `logit_rows` None asks for every node's logits; `wanted`
    None for whole logits.
    """
    size = len(tree)
    if size == 1 and not any(map(len, pseudo_parents)) and logit_rows is None:
        # A plain step: there are many of them, and they are all alike.
        position = np.array([start], dtype=np.int64)
        return Rows(tree.tokens, position, ITSELF, pseudo_parents, FIRST_ROW, phase, wanted or WholeLogits(), shortlist)
    tree_part = _ancestors(tree)
    parents = np.concatenate([pseudo_parents[k] for k in join_order]) if pseudo_parents else np.empty(0, np.int64)
    steps = np.repeat(np.array(join_order, dtype=np.int64), [len(pseudo_parents[k]) for k in join_order])
    mask = np.zeros((size + len(parents),) * 2, dtype=bool)
    mask[:size, :size] = tree_part
    mask[size:, :size] = tree_part[parents]
    mask[size:, size:] = (parents[:, None] == parents[None, :]) & (steps[None, :] <= steps[:, None])
    positions = np.concatenate([tree.depths, tree.depths[parents] + steps + 1]) + start
    asked = np.arange(size, dtype=np.int64) if logit_rows is None else logit_rows
    return Rows(tree.tokens, positions, mask, pseudo_parents, asked, phase, wanted or WholeLogits(), shortlist)


def prompt_rows(
    tokens: Sequence[int],
    join_order: Sequence[int],
    start: int,
    draft_steps: int = 0,
    *,
    wanted: Wanted | None = None,
    shortlist: int = 0,
    every_logit: bool = False,
) -> Rows:
    """Return the rows of a prompt chunk that begins at the absolute position `start`: the logits of its last token are
    asked for, or with `every_logit` those of all, and drafts of the first `draft_steps` steps after it.
    """
    last = np.array([len(tokens) - 1], dtype=np.int64)
    asked = None if every_logit else last
    parents = tuple(last[: int(step < draft_steps)] for step in range(len(join_order)))
    return lay_out(
        chain(tokens), parents, join_order, start, asked, phase=Phase.PROMPT, wanted=wanted, shortlist=shortlist
    )


def _ancestors(tree: Tree) -> NDArray[np.bool_]:
    mask = np.eye(len(tree), dtype=bool)
    for node in range(1, len(tree)):
        mask[node] |= mask[tree.parents[node]]
    return mask
