"""The meaning of choices on the device, in numpy. Every implementation is tested against this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugins.choosing import BEST, LANES, RACE, SCORE_MARGIN, TOP, Tiling

NOTHING, NOT_A_NUMBER = np.int32(-(2**31)), np.int32(2**31 - 1)


def tempered(logits: NDArray[np.float32], temperature: np.float32) -> NDArray[np.float32]:
    """Return logits [V] divided by the temperature; that which is nothing has no sign."""
    found = logits / np.float32(temperature)
    found[found == 0] = 0.0
    return found


def numbered(logits: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return integers [V] in the order of the logits [V], what is not a number the largest."""
    bits = logits.view(np.int32)
    found = bits ^ ((bits >> 31) & NOT_A_NUMBER)
    found[np.isnan(logits)] = NOT_A_NUMBER
    return found


def as_floats(numbers: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return the logits that `numbered` gave these numbers."""
    return (numbers ^ ((numbers >> 31) & NOT_A_NUMBER)).view(np.float32)


def peaks(logits: NDArray[np.float32], tiling: Tiling) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the largest numbers of each block [splits], and of each group [groups], of tempered logits [V]."""
    found = blocks(numbered(logits), NOTHING, tiling)
    groups = found.reshape(tiling.splits, tiling.group, -1).max(axis=1)
    return found.max(axis=1), groups.reshape(-1)


def blocks(values: NDArray[Any], nothing: Any, tiling: Tiling) -> NDArray[Any]:
    """Return values [V] as programs take them [splits, block], `nothing` behind the row's end."""
    padded = np.full(tiling.splits * tiling.block, nothing, dtype=values.dtype)
    padded[: len(values)] = values
    runs = padded.reshape(-1, tiling.splits, min(LANES, tiling.block))
    return runs.transpose(1, 0, 2).reshape(tiling.splits, tiling.block)


def scores(logits: NDArray[np.float32], top: np.float32, key: int, least: np.float32) -> NDArray[np.float64]:
    """Return the logarithms [V] of 1 / wait: d - log(-log(u)), d by how much a tempered logit is below the `top`, u the
    token's number of the position's `key` as `runtime.sampling.noise` has it; -inf where d is less than `least`.
    """
    words = np.arange(1, len(logits) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words = (words ^ (words >> np.uint64(31))) >> np.uint64(11)
    uniforms = (words.astype(np.float64) + 0.5) * 2.0**-53
    with np.errstate(divide="ignore", invalid="ignore"):
        below = (logits - top).astype(np.float64)
        found = below - np.log(-np.log(uniforms))
    return np.where((below > -np.inf) & (below >= least), found, -np.inf)


def weigh(logits: NDArray[np.float32], top: np.float32, job: np.void, tiling: Tiling) -> NDArray[np.float32]:
    """Return of each block [splits] of tempered logits [V] the largest score, or the sum of exponentials."""
    if job["kind"] == RACE:
        found = scores(logits, top, int(job["key"]), job["least"])
        return blocks(found, -np.inf, tiling).max(axis=1).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        weights = np.exp((logits - top).astype(np.float64))
    return blocks(weights, 0.0, tiling).sum(axis=1).astype(np.float32)


@dataclass(frozen=True)
class Answer:
    """The tokens collected, in rising order, the largest tempered logit, and the largest score or the sum."""

    tokens: NDArray[np.int64]
    top: np.float32
    total: np.float32


def collect(
    logits: NDArray[np.float32],
    tops: NDArray[np.int32],
    groups: NDArray[np.int32],
    sums: NDArray[np.float32],
    job: np.void,
) -> Answer:
    """Return the answer to a job on tempered logits [V], from what `peaks` and `weigh` found."""
    largest = tops.max()
    top = as_floats(np.array([largest]))[0]
    if job["kind"] == RACE:
        best = sums.max()
        wanted = scores(logits, top, int(job["key"]), job["least"]) >= np.float32(best - np.float32(2 * SCORE_MARGIN))
        return Answer(np.flatnonzero(wanted), top, best)
    bound, total = largest, np.float32(0)
    if job["kind"] == BEST:
        total = sums.sum(dtype=np.float32)
        count = int(job["count"])
        bound = np.sort(groups)[-count] if count <= len(groups) else NOTHING
    else:
        assert job["kind"] == TOP
    return Answer(np.flatnonzero(numbered(logits) >= bound), top, total)
