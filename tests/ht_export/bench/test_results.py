"""A file of results that somebody else wrote, or that is of another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ht_export.bench.results import Results
from ht_export.bench.settings import Job
from runtime import InputError, Sampling
from tests.ht_export.bench.rows import row

CONDITIONS = {"date": "2025-01-01", "commit": "0", "model": "tiny"}
JOBS = [Job("0", "a", "Hello", Sampling())]


@pytest.mark.parametrize(
    "conditions",
    [
        {**CONDITIONS, "\ud800\x1b[2J\n": 1},
        {**CONDITIONS, "model": {"\x00": "x" * 10**6}},
        {**CONDITIONS, **{f"key {number}": "x" * 100 for number in range(10_000)}},
    ],
    ids=["a name", "a value", "many"],
)
def test_conditions_that_differ_are_told_in_one_short_line(tmp_path: Path, conditions: dict) -> None:
    path = tmp_path / "results.json"
    Results(path, CONDITIONS, JOBS).add(row())
    path.write_text(json.dumps({**json.loads(path.read_text()), "conditions": conditions}))
    with pytest.raises(InputError, match=r"holds results under other conditions: .* there and .* now") as raised:
        Results(path, CONDITIONS, JOBS)
    assert len(str(raised.value)) < 1500
    assert str(raised.value).isprintable()
