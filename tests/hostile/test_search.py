"""Hostile input, generated: each run searches for a while, see `search.py`, and longer with `--hostile 30m`."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import HOSTILE_SECONDS, duration
from tests.hostile.generators import GROUPS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
# Shares of the time, imports and all: the last two have many.
SHARES = {"engine files": 0.25, "requests": 0.25, "checkpoints": 0.35, "build time": 0.35}
# Not more threads than there are processes of tests, and no memory set aside for any.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("group", GROUPS)
def test_hostile_input_is_one_error_or_none(
    group: str, tmp_path: Path, pytestconfig: pytest.Config, record_property: Callable[[str, object], None]
) -> None:
    seconds = pytestconfig.getoption("--hostile")
    # The same cases each time, but for who asks for more.
    seed = 0 if seconds == HOSTILE_SECONDS else random.randrange(1 << 30)
    arguments = {
        "--kind": group,
        "--seconds": str(SHARES[group] * seconds),
        "--seed": str(seed),
        "--cases": str(tmp_path),
    }
    command = [sys.executable, "-m", "tests.hostile.search", *(part for pair in arguments.items() for part in pair)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + 1200, check=False, env={**os.environ, **ENVIRONMENT}
    )
    if done.returncode:
        last = max(tmp_path.glob("*.case"), key=lambda path: path.stat().st_mtime_ns, default=None)
        pytest.fail(
            f"the search ended with status {done.returncode}; what it died of, perhaps: {_again(last)}\n"
            f"{done.stderr[-5000:]}"
        )
    for found in json.loads(done.stdout):
        record_property("hostile", f"{found['kind']}: {found['cases']} cases, {found['accepted']} of them read")
        assert found["cases"], f"no time for {found['kind']}"
        if fault := found["fault"]:
            pytest.fail(
                f"{found['kind']}: {fault['wrong']}\n{fault['trace']}\n{fault['case']}\n{_again(Path(fault['file']))}"
            )


def _again(path: Path | None) -> str:
    return "nothing" if path is None else f"python -m tests.hostile.search --again '{path}'"


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("0.5m", 30)])
def test_a_duration_has_a_unit(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "-1s", "1d", "30 m", "1e3s", "0s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^'{text}' is not a duration such as 90s, 30m or 2h$"):
        duration(text)
