"""A batch laid out for the graph: every request's rows brought to one shared size, and stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime import bindings
from runtime.arrays import IntArray
from runtime.bindings import dynamic_dims
from runtime.rows import Rows
from runtime.tree import TreeSizes


@dataclass(frozen=True)
class BatchInputs:
    """The inputs of the graph but for the cache, by name, as `runtime.bindings` has them: [B, ...].

    `sizes` are those that all requests share, `logit_count` is M. The real tree rows, and their logits, come first;
    `pseudo` [B] has for each request the rows of the draft logits that are of its real pseudo rows.
    """

    sizes: TreeSizes
    logit_count: int
    values: dict[str, NDArray]
    pseudo: tuple[IntArray, ...]

    def dims(self, capacity: int) -> dict[str, int]:
        """Return the value of each letter, for caches of S = `capacity` rows."""
        batch = len(self.values[bindings.INPUT_IDS])
        return dynamic_dims(self.sizes.tree_rows, self.sizes.pseudo_rows, self.logit_count, capacity, batch)


def stack(
    batch: Sequence[Rows], lengths: Sequence[int], join_order: Sequence[int], sizes: TreeSizes | None = None
) -> BatchInputs:
    """Return the rows of B requests, behind so many cached ones each (`lengths` [B]), laid out in `sizes`, a row of
    logits for every tree row; or, with None, in the least sizes that all requests share, which copies nothing for a
    single one.
    """
    if sizes is None:
        sizes = shared_sizes(batch)
        logit_count = max(len(rows.logit_rows) for rows in batch)
    else:
        logit_count = sizes.tree_rows
    padded = [pad(rows, sizes, logit_count, join_order) for rows in batch]
    parts: dict[str, list[NDArray]] = {
        bindings.INPUT_IDS: [one.rows.input_ids for one in padded],
        bindings.POSITION_IDS: [one.rows.position_ids for one in padded],
        bindings.TREE_MASK: [one.rows.tree_mask for one in padded],
        bindings.LOGIT_ROWS: [one.rows.logit_rows for one in padded],
    }
    for step in range(len(join_order)):
        parts[bindings.pseudo_parent(step + 1)] = [one.rows.pseudo_parents[step] for one in padded]
    values = {name: _together(arrays) for name, arrays in parts.items()}
    values[bindings.CACHE_LENGTH] = np.array(lengths, dtype=np.int64)
    return BatchInputs(sizes, logit_count, values, tuple(one.pseudo for one in padded))


def _together(arrays: Sequence[NDArray]) -> NDArray:
    """Return [B, ...] of B arrays of one shape."""
    # `np.stack` makes a view of each before it copies them, and takes twice as long.
    return np.concatenate(arrays).reshape(len(arrays), *arrays[0].shape) if len(arrays) > 1 else arrays[0][None]


def shared_sizes(batch: Sequence[Rows]) -> TreeSizes:
    """Return the least sizes that hold the rows of every request."""
    counts = zip(*(rows.counts for rows in batch), strict=True)
    return TreeSizes(max(len(rows.input_ids) for rows in batch), tuple(map(max, counts)))


def bucket(rows: Sequence[Rows], usual: TreeSizes, most: int) -> TreeSizes:
    """Return the sizes to bring `rows` to: the usual ones where they suffice, else powers of two, up to `most`; so that
    engines which prefer fixed shapes see few of them.

    Passes that draft nothing, as in plain decoding, are not brought to the usual size: their one row would cost as much
    as a tree.
    """
    sizes = shared_sizes(rows)
    usual_tree = usual.tree_rows if any(sizes.pseudo_rows) else 1
    return TreeSizes(
        _up(sizes.tree_rows, usual_tree, most),
        tuple(
            _up(count, up, most) if count else 0 for count, up in zip(sizes.pseudo_rows, usual.pseudo_rows, strict=True)
        ),
    )


@dataclass(frozen=True)
class PaddedRows:
    """`rows` with rows of no meaning added, and where the draft logits of the real pseudo rows are: `pseudo` [sum R_k].

    The real tree rows, and their logits, come first.
    """

    rows: Rows
    pseudo: IntArray


def pad(rows: Rows, sizes: TreeSizes, logit_count: int, join_order: Sequence[int]) -> PaddedRows:
    """Return `rows` with `sizes`, and so many rows of logits. A row added sees itself alone, and none other sees it."""
    tree = len(rows.input_ids)
    if TreeSizes(tree, rows.counts) == sizes and len(rows.logit_rows) == logit_count:
        return PaddedRows(rows, np.arange(sum(rows.counts), dtype=np.int64))
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
    padded = replace(
        rows,
        input_ids=_extend(rows.input_ids, sizes.tree_rows),
        position_ids=positions,
        tree_mask=mask,
        pseudo_parents=tuple(
            _extend(parents, count) for parents, count in zip(rows.pseudo_parents, sizes.pseudo_rows, strict=True)
        ),
        logit_rows=_extend(rows.logit_rows, logit_count),
    )
    return PaddedRows(padded, pseudo - sizes.tree_rows)


def _extend(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return np.concatenate([values, np.zeros(count - len(values), dtype=np.int64)])


def _up(count: int, usual: int, most: int) -> int:
    return usual if count <= usual else min(1 << (count - 1).bit_length(), most)
