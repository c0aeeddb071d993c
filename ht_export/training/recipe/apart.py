"""Prompts kept apart to measure on, where a user names none."""

from __future__ import annotations

import json
import random
from pathlib import Path

from ht_export.prompts import read_conversations, without_duplicates
from runtime.errors import InputError
from runtime.files import atomic_path

SHARE = 0.05
MOST_APART = 200
LEAST_PROMPTS = 2


def keep_apart(prompts: Path, out: Path, max_prompts: int | None, seed: int) -> tuple[int, int]:
    """Write a random part of `prompts` to `out`: 5 % of those that are used, at most 200; return the number of
    both. Only the first turn of each counts. Raises `InputError` for too few.
    """
    distinct = without_duplicates(read_conversations(prompts), max_turns=1)
    if len(distinct) < LEAST_PROMPTS:
        raise InputError(
            f"{prompts} has {len(distinct)} different prompts, of which none can be kept apart to measure on; give at "
            f"least {LEAST_PROMPTS}, hundreds to learn anything, or measure on others with --held-out"
        )
    used = min(len(distinct), max_prompts or len(distinct))
    count = min(MOST_APART, max(1, round(SHARE * used)))
    chosen = sorted(random.Random(seed).sample(range(len(distinct)), count))
    lines = ({"id": one.id, "task": one.task, "turns": one.turns} for one in map(distinct.__getitem__, chosen))
    with atomic_path(out) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return count, len(distinct)
