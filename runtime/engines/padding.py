"""Rows brought to few sizes, so that engines which prefer fixed shapes see few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.tree import Rows, TreeSizes


@dataclass(frozen=True)
class PaddedRows:
    """`rows` with rows of no meaning added, and where the draft logits of the real pseudo rows are: `pseudo` [sum R_k].

    The real tree rows, and their logits, come first.
    """

    rows: Rows
    pseudo: NDArray[np.int64]


def bucket(rows: Rows, usual: TreeSizes, most: int) -> TreeSizes:
    """Return the sizes to bring `rows` to: the usual ones where they suffice, else powers of two, up to `most`.

    Passes that draft nothing, as in plain decoding, are not brought to the usual size: their one row would cost as much
    as a tree.
    """
    counts = [len(parents) for parents in rows.pseudo_parents]
    tree_rows = len(rows.input_ids)
    usual_tree = usual.tree_rows if any(counts) else 1
    return TreeSizes(
        _up(tree_rows, usual_tree, most),
        tuple(_up(count, up, most) if count else 0 for count, up in zip(counts, usual.pseudo_rows, strict=True)),
    )


def pad(rows: Rows, sizes: TreeSizes, join_order: Sequence[int]) -> PaddedRows:
    """Return `rows` with `sizes`, and a row of logits for every tree row. A row added sees itself alone, and no other
    row sees it.
    """
    tree = len(rows.input_ids)
    real = []
    end = sizes.tree_rows
    for step in join_order:
        real.append(end + np.arange(len(rows.pseudo_parents[step]), dtype=np.int64))
        end += sizes.pseudo_rows[step]
    pseudo = np.concatenate(real) if real else np.empty(0, dtype=np.int64)
    index = np.concatenate([np.arange(tree, dtype=np.int64), pseudo])
    mask = np.eye(end, dtype=bool)
    mask[np.ix_(index, index)] = rows.tree_mask
    positions = np.zeros(end, dtype=np.int64)
    positions[index] = rows.position_ids
    padded = Rows(
        input_ids=_extend(rows.input_ids, sizes.tree_rows),
        position_ids=positions,
        tree_mask=mask,
        pseudo_parents=tuple(
            _extend(parents, count) for parents, count in zip(rows.pseudo_parents, sizes.pseudo_rows, strict=True)
        ),
        logit_rows=_extend(rows.logit_rows, sizes.tree_rows),
    )
    return PaddedRows(padded, pseudo - sizes.tree_rows)


def _extend(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return np.concatenate([values, np.zeros(count - len(values), dtype=np.int64)])


def _up(count: int, usual: int, most: int) -> int:
    return usual if count <= usual else min(1 << (count - 1).bit_length(), most)
