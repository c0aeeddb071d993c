"""The program behind the table of changes to training, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("plain", "five", "hard", "both", "adapters-8", "consistent", "acceptance", "muon", "muon-all", "wide")


def test_variants_begin_as_the_same_and_go_on_where_they_were_stopped(
    tiny_checkpoint: Path, tiny_transfer: Path, data_folder: Path, held_out_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for steps in (1, 4):
        command = [
            sys.executable, str(ROOT / "docs/measuring/transfer_variants.py"), str(tiny_checkpoint),
            "--data", str(data_folder), "--held-out", str(held_out_folder), "--apart", "2", "--texts", "2",
            "--draft-size", "64", "--start", str(tiny_transfer), "--out", str(out), "--variants", ",".join(NAMES),
            "--steps", str(steps), "--anchors", "8", "--checkpoint-every", "1", "--dtype", "bfloat16",
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
    assert "continuing at step 1" in done.stderr
    found = json.loads((out / "results.json").read_text())
    assert [one["step"] for one in found["losses"]] == [1, 2, 3, 4]
    assert [one["step"] for one in found["measured"]] == [0, 1, 4]
    first, last = found["losses"][0]["kl"], found["losses"][-1]["kl"]
    # What a variant adds begins as nothing.
    assert all(first[name][:4] == pytest.approx(first["plain"], rel=1e-3) for name in NAMES)
    assert len({tuple(kl[:4]) for kl in last.values()}) == len(NAMES)
    assert set(found["measured"][-1]["held_out"]["five"]["tokens_per_step"]) == {"8", "16", "32"}
