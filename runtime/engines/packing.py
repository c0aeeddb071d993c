"""A batch laid out for the lowered graph: the rows of all requests one behind the other, and none to spare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime import bindings
from runtime.arrays import IntArray
from runtime.engines.layout import BatchInputs, stack
from runtime.rows import Rows


@dataclass(frozen=True)
class PackedInputs:
    """The inputs of the lowered graph but for the cache, by name, as `GraphDims.lowered_inputs` has them.

    Of all requests together come `logit_rows` rows of logits and `pseudo_rows` of draft logits; of each of the P,
    `logits` and `pseudo` say which are its own. Into every slot `written` rows are written, some of no meaning.
    """

    values: dict[str, NDArray]
    logit_rows: int
    pseudo_rows: int
    written: int
    logits: tuple[slice, ...]
    pseudo: tuple[IntArray, ...]


def pack(batch: Sequence[Rows], lengths: Sequence[int], join_order: Sequence[int]) -> PackedInputs:
    """Return the rows of P requests, behind so many cached ones each (`lengths` [P])."""
    if len(batch) == 1 or all(len(rows.position_ids) == 1 for rows in batch):
        return _stacked(batch, stack(batch, lengths, join_order))
    trees = [len(rows.input_ids) for rows in batch]
    counts = np.array([rows.counts for rows in batch])
    firsts = np.cumsum([0, *trees])
    total = int(firsts[-1])
    # Of every request the numbers of its rows, in its own order.
    numbers = [[np.arange(first, first + size)] for first, size in zip(firsts, trees, strict=False)]
    end = total
    for step in join_order:
        for own, count in zip(numbers, counts[:, step].tolist(), strict=True):
            if count:
                own.append(np.arange(end, end + count))
                end += count
    of_slots = [np.concatenate(own) if len(own) > 1 else own[0] for own in numbers]
    slot_rows = np.full((len(batch), max(map(len, of_slots))), -1, dtype=np.int64)
    row_slots, row_places, positions = (np.empty(end, dtype=np.int64) for _ in range(3))
    mask = np.zeros((end, end), dtype=bool)
    for slot, (rows, mine) in enumerate(zip(batch, of_slots, strict=True)):
        slot_rows[slot, : len(mine)] = mine
        row_slots[mine] = slot
        row_places[mine] = np.arange(len(mine))
        positions[mine] = rows.position_ids
        mask[mine[:, None], mine] = rows.tree_mask
    values: dict[str, NDArray] = {
        bindings.INPUT_IDS: np.concatenate([rows.input_ids for rows in batch])[None],
        bindings.POSITION_IDS: positions[None],
        bindings.TREE_MASK: mask[None],
        bindings.LOGIT_ROWS: _shifted([rows.logit_rows for rows in batch], firsts),
    }
    for step in range(len(join_order)):
        values[bindings.pseudo_parent(step + 1)] = _shifted([rows.pseudo_parents[step] for rows in batch], firsts)
    values[bindings.CACHE_LENGTH] = np.array(lengths, dtype=np.int64)
    values[bindings.SLOT_ROWS] = slot_rows
    values[bindings.ROW_SLOTS], values[bindings.ROW_PLACES] = row_slots, row_places
    ends = np.cumsum([0, *(len(rows.logit_rows) for rows in batch)]).tolist()
    return PackedInputs(
        values,
        ends[-1],
        end - total,
        slot_rows.shape[1],
        tuple(map(slice, ends, ends[1:])),
        tuple(own[size:] - total for own, size in zip(of_slots, trees, strict=True)),
    )


def nobodys_rows(slots: int) -> dict[str, NDArray]:
    """Return the inputs that tell rows of different slots apart, where there are none to tell apart."""
    return {
        bindings.SLOT_ROWS: np.zeros((slots, 1), dtype=np.int64),
        bindings.ROW_SLOTS: np.zeros(1, dtype=np.int64),
        bindings.ROW_PLACES: np.zeros(1, dtype=np.int64),
    }


def _shifted(numbers: Sequence[IntArray], firsts: IntArray) -> IntArray:
    return np.concatenate([own + first for own, first in zip(numbers, firsts, strict=False)])[None]


def _stacked(batch: Sequence[Rows], laid_out: BatchInputs) -> PackedInputs:
    """Return what has no rows to spare as it is: the rows of one request, or one of each of several."""
    count, size = len(batch), laid_out.logit_count
    pseudo_rows = sum(laid_out.sizes.pseudo_rows)
    return PackedInputs(
        laid_out.values | nobodys_rows(count),
        count * size,
        count * pseudo_rows,
        laid_out.sizes.tree_rows + pseudo_rows,
        tuple(slice(size * index, size * index + len(rows.logit_rows)) for index, rows in enumerate(batch)),
        laid_out.pseudo,
    )
