"""The tokens that may be drawn, and their weights.

Nothing here sorts or accumulates a whole vocabulary: that takes longer than all else between two passes.
"""

from __future__ import annotations

import threading

import numpy as np

from runtime.arrays import Float32Array, IntArray

BLOCK = 64


def candidates(
    logits: Float32Array,
    top: float,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    out: Float32Array | None = None,
) -> tuple[IntArray | None, Float32Array]:
    """Return the tokens [N] that the options keep, in rising order, None for all; and their weights [N].

    A weight is the token's probability divided by the largest one. `top` is the largest of logits [V]. Weights of a
    whole vocabulary are written to `out` [V]. Options mean what they do in transformers: see `Sampling`.
    """
    tokens = None
    if top_k is not None and top_k < len(logits):
        tokens = largest(logits, top_k)
        logits = logits[tokens]
    weights = np.subtract(logits, np.float32(top), out=out if tokens is None else None)
    np.exp(weights, out=weights)
    if top_p is not None and top_p < 1.0:
        kept = _most_probable(logits, weights, top, top_p)
        tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
    if min_p:
        kept = (weights >= min_p).nonzero()[0]
        tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
    return tokens, weights


def largest(logits: Float32Array, count: int) -> IntArray:
    """Return where the `count` largest of logits [N] are, and all that equal the last of them, in rising order."""
    # The count-th largest of the maxima of disjoint groups is a bound: at least `count` logits reach it, and, where
    # there are several times as many groups, few more.
    size = max(1, min(BLOCK, len(logits) // (4 * count)))
    groups = len(logits) // size
    grouped = logits[: groups * size].reshape(size, groups)
    maxima = grouped.max(axis=0)
    bound = np.partition(maxima, -count)[-count]
    # So few groups have them that the others need not be looked at again.
    some = (maxima >= bound).nonzero()[0]
    rows, columns = (grouped[:, some] >= bound).nonzero()
    near = rows * groups + some[columns]
    if groups * size < len(logits):
        near = np.append(near, groups * size + (logits[groups * size :] >= bound).nonzero()[0])
    values = logits[near]
    return near[values >= np.partition(values, -count)[-count]]


def sum_of_weights(logits: Float32Array, top: float) -> float:
    """Return the sum of exp(logit - top) of logits [V], of which `top` is the largest, but for rounding in float32."""
    size = len(logits)
    if len(_scratch.weights) < size:
        _scratch.weights = np.empty(size, dtype=np.float32)
    weights = np.subtract(logits, np.float32(top), out=_scratch.weights[:size])
    np.exp(weights, out=weights)
    # Side by side, which takes a third of the time of one after the other.
    whole = size // BLOCK * BLOCK
    total = float(weights[:whole].reshape(BLOCK, -1).sum(axis=0).sum(dtype=np.float64))
    return total + float(weights[whole:].sum(dtype=np.float64))


class _Scratch(threading.local):
    """Memory that is written over and over, one for each thread."""

    def __init__(self) -> None:
        self.weights = np.empty(0, dtype=np.float32)


_scratch = _Scratch()


def _most_probable(logits: Float32Array, weights: Float32Array, top: float, top_p: float) -> IntArray:
    """Return where the most probable tokens are, up to the first with which they have `top_p` of all weights [N].

    Among equals at the end the larger tokens are kept, as transformers keeps them where its sort happens to be stable.
    """
    total = float(weights.sum(dtype=np.float64))
    wanted = top_p * total
    # Even all tokens together could not make up the rest of the weights where each has less than this; the factor is
    # for what rounding does to a weight.
    least = 0.99 * (total - wanted) / len(logits)
    near = (weights >= least).nonzero()[0]
    values = logits[near]
    falling = np.sort(values)[::-1]
    reached = np.exp(falling - np.float32(top)).astype(np.float64).cumsum()
    # Summed in another order, all of them may be short of it by rounding.
    count = min(int(reached.searchsorted(wanted)) + 1, len(falling))
    return near[reaching(values, falling, count)]


def reaching(logits: Float32Array, falling: Float32Array, count: int) -> IntArray:
    """Return where the `count` largest of logits [N] are, in rising order; `falling` are they sorted.

    Among equals at the end the larger tokens are kept.
    """
    last = falling[count - 1]
    equals = (logits == last).nonzero()[0]
    kept = logits >= last
    kept[equals[: np.count_nonzero(kept) - count]] = False
    return kept.nonzero()[0]
