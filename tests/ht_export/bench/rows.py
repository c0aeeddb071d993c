"""Rows as they are measured, made by hand."""

from __future__ import annotations

from typing import Any

from ht_export.bench.measure import Difference, Row, Runs


def runs(speeds: float | list[float], **changes: Any) -> Runs:
    """Return runs with these tokens per second, 10 tokens each, one a step; decoding alone is twice as fast."""
    speeds = speeds if isinstance(speeds, list) else [speeds]
    fields: dict[str, Any] = {
        "new_tokens": [10] * len(speeds),
        "steps": [10] * len(speeds),
        "tokens_per_second": speeds,
        "decode_tokens_per_second": [2 * speed for speed in speeds],
        "time_to_first_token_s": [0.25] * len(speeds),
        "accepted": [],
        "identical": True,
        "difference": None,
    }
    return Runs(**{**fields, **changes})


def row(id: str = "0", task: str = "a", seed: int | None = None, **ways: Runs) -> Row:
    """Return a row of these ways, of speculative and plain decoding where they are not given."""
    ways = {"plain": runs(10.0), "speculative": runs(15.0)} | ways
    return Row(id, task, seed, 7, ways)


def differing(wrong: bool, gap: float | None = 0.5, position: int = 3) -> Runs:
    """Return runs whose text parts from that of plain decoding."""
    return runs(15.0, identical=False, difference=Difference(position, gap, wrong))
