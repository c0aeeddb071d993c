"""Jobs for the kernels of choices, and the noise that they see, in tests."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from plugins.choosing import BEST, HEADER, JOB, MOST_BEST, RACE, RACE_ROOM, TOP, TOP_ROOM, answer_words, best_room

MASK = (1 << 64) - 1
GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key_for(token: int, number: int) -> int:
    """Return the key of the position at which the 53 bits of `token`'s noise are `number`."""

    def unshift(value: int, by: int) -> int:
        found = value
        for _ in range(64 // by):
            found = value ^ (found >> by)
        return found

    word = unshift(number << 11, 31)
    word = unshift(word * pow(SECOND, -1, 1 << 64) & MASK, 27)
    word = unshift(word * pow(FIRST, -1, 1 << 64) & MASK, 30)
    return (word - (token + 1) * GAMMA) & MASK


def random_logits(rng: np.random.Generator, vocab_size: int, odd: bool) -> NDArray[np.float32]:
    """Return logits [V]: flat or peaked, with many equals or few; with `odd` some that no model should have."""
    logits = (rng.standard_normal(vocab_size) * rng.choice([0.1, 3, 30])).astype(np.float32)
    if rng.random() < 0.3:
        logits = np.round(logits)
    logits[rng.random(vocab_size) < 0.05] = -np.inf
    logits[rng.random(vocab_size) < 0.05] = -0.0
    if rng.random() < 0.2:
        logits[:] = logits[0]
    if odd:
        logits[rng.integers(vocab_size)] = rng.choice(np.array([np.nan, np.inf, -np.nan, -np.inf], dtype=np.float32))
    return logits


def random_jobs(rng: np.random.Generator, count: int) -> NDArray[np.void]:
    """Return jobs [N] of all kinds, without rows; their answers lie one behind the other."""
    jobs = np.zeros(count, dtype=JOB)
    end = 0
    for job in jobs:
        job["kind"] = rng.choice([TOP, RACE, BEST])
        job["key"] = rng.integers(0, MASK, dtype=np.uint64, endpoint=True)
        job["count"] = min(int(rng.geometric(0.1)), MOST_BEST)
        job["temperature"] = rng.choice([1.0, 0.7, 1.5, 0.01])
        job["least"] = rng.choice([-np.inf, math.log(0.05)])
        rooms = {TOP: TOP_ROOM, RACE: RACE_ROOM, BEST: best_room(int(job["count"]))}
        job["room"] = rooms[int(job["kind"])]
        job["out"] = end
        end += answer_words(int(job["room"]))
    return jobs


def results_for(jobs: NDArray[np.void]) -> NDArray[np.int32]:
    """Return results for `jobs` to be answered in, that hold anything."""
    return np.full(sum(answer_words(int(room)) for room in jobs["room"]), 0x55555555, dtype=np.int32)


def answer(job: np.void, results: NDArray[np.int32]) -> tuple[int, np.float32, np.float32, dict[int, np.float32]]:
    """Return how many tokens there are, top, total, and the logit of each token there was room for."""
    out, room = int(job["out"]), int(job["room"])
    count, top, total, _ = results[out : out + HEADER]
    held = min(int(count), room)
    tokens = results[out + HEADER : out + HEADER + held].tolist()
    logits = results[out + HEADER + room : out + HEADER + room + held].view(np.float32)
    assert len(set(tokens)) == held
    return int(count), top.view(np.float32), total.view(np.float32), dict(zip(tokens, logits, strict=True))
