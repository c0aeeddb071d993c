import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ht_export.model.checkpoint import BaseModel
from ht_export.training import cli
from ht_export.training import sweep as sweep_module
from ht_export.training.data import AnsweredPrompt
from ht_export.training.fit import fit
from ht_export.training.settings import FitSettings
from ht_export.training.sweep import SweepRow, SweepSettings, default_placements, recommendation, sweep, table
from runtime.errors import InputError
from tests.ht_export.training.conftest import QUIET

PLACEMENTS = ((1, 1), (2, 2), (3, 3), (4, 4), (3, 2))
SETTINGS = SweepSettings(PLACEMENTS, steps=8, rungs=3)
FIT = FitSettings(layers=(1,), sequences=2, anchors=4, learning_rate=0.02)
ROW: SweepRow = {
    "name": "3-2-1",
    "layers": [3, 2, 1],
    "steps": 5,
    "top1": [0.5, 0.2, 0.1],
    "top8": [0.8, 0.6, 0.4],
    "sizes": {"tree_rows": 8, "pseudo_rows": [4, 4, 0]},
    "tokens_per_step": 2.0,
    "cost": 1.25,
    "speedup": 1.6,
    "finalist": True,
}


def test_each_rung_trains_the_better_half_for_twice_as_long(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[tuple[tuple[int, ...], int]] = []

    def counted(model: BaseModel, data: list[AnsweredPrompt], settings: FitSettings, *rest: Any, **options: Any) -> Any:
        fits.append((settings.layers, settings.steps))
        return fit(model, data, settings, *rest, **options)

    monkeypatch.setattr(sweep_module, "fit", counted)
    rows = sweep(base, sequences, sequences[:3], FIT, SETTINGS, tmp_path, QUIET, report=lambda _: None)
    assert [steps for _, steps in fits] == [2] * 5 + [4] * 3 + [8] * 2
    assert len(rows) == 5
    assert [row["finalist"] for row in rows] == [True, True, False, False, False]
    assert rows[0]["speedup"] >= rows[1]["speedup"]
    assert all(row["speedup"] == pytest.approx(row["tokens_per_step"] / row["cost"], abs=1e-3) for row in rows)

    fits.clear()
    assert sweep(base, sequences, sequences[:3], FIT, SETTINGS, tmp_path, QUIET, report=lambda _: None) == rows
    assert not fits


def test_a_sweep_goes_on_where_it_was_killed(base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path) -> None:
    whole = sweep(base, sequences, sequences[:3], FIT, SETTINGS, tmp_path / "whole", QUIET, report=lambda _: None)

    def dies(text: str) -> None:
        if text.startswith("3-2 after 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(base, sequences, sequences[:3], FIT, SETTINGS, tmp_path / "killed", QUIET, report=dies)
    resumed = sweep(base, sequences, sequences[:3], FIT, SETTINGS, tmp_path / "killed", QUIET, report=lambda _: None)
    assert resumed == whole
    cached = sweep(
        base,
        sequences,
        sequences[:3],
        FIT,
        SETTINGS,
        tmp_path / "cached",
        QUIET,
        feature_cache=tmp_path / "cache",
        report=lambda _: None,
    )
    assert [row["name"] for row in cached] == [row["name"] for row in whole]
    with pytest.raises(InputError, match="holds a sweep with another row_cost"):
        changed = replace(SETTINGS, row_cost=0.5)
        sweep(base, sequences, sequences[:3], FIT, changed, tmp_path / "killed", QUIET, report=lambda _: None)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{", "Expecting property name"),
        ("[]", "Expected `object`"),
        ("{}", "missing required field `results`"),
        ('{"results": {"3-2": {}}}', "length >= 1"),
        ('{"results": {"3-2": {"2": 3}}}', "Expected `object`, got `int`"),
        (json.dumps({"results": {"3-2": {"2": {**ROW, "speedup": "2"}}}}), r"`float`, got `str` - at .*speedup"),
        (json.dumps({"results": {"3-2": {"2": {**ROW, "speedup": float("nan")}}}}), r">= 0\.0 - at .*speedup"),
        (json.dumps({"results": {"3-2": {"2": {**ROW, "layers": []}}}}), r"length >= 1 - at .*layers"),
        (json.dumps({"results": {"3-2": {"2": {**ROW, "steps": 10**30}}}}), r"out of range - at .*steps|<= .*steps"),
        ('{"results": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_damaged_results_are_named(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path, content: str, cause: str
) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(InputError, match=rf"sweep\.json is not a valid file of sweep results .*{cause}"):
        sweep(base, sequences, sequences[:3], FIT, SETTINGS, tmp_path, QUIET, report=lambda _: None)


def test_the_default_placements_span_the_depth() -> None:
    placements = default_placements(30, 3)
    assert (20, 20, 20) in placements
    assert (30, 30, 30) in placements
    assert (20, 15, 10) in placements
    assert len(set(placements)) == len(placements)
    assert all(len(p) == 5 for p in default_placements(2, 5))


def test_the_command_prints_a_table_and_a_recommendation(
    tiny_checkpoint: Path,
    data_folder: Path,
    held_out_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = ["--data", str(data_folder), "--held-out", str(held_out_folder), "--out", str(tmp_path)]
    options = [
        "--placement",
        "2,2",
        "--placement",
        "3,2",
        "--steps",
        "2",
        "--rungs",
        "2",
        "--sequences",
        "2",
        "--anchors",
        "4",
        "--evaluate-texts",
        "2",
        "--dtype",
        "float32",
        "--feature-cache",
        str(tmp_path / "cache"),
    ]
    assert cli.main(["sweep", str(tiny_checkpoint), *places, *options]) == 0
    printed = capsys.readouterr().out
    assert "| speed-up |" in printed
    assert "Recommended at 0.05 plain passes a row" in printed
    assert (tmp_path / "sweep.md").read_text().strip() == printed.strip()
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_recommendation_names_only_the_draft_steps_that_pay() -> None:
    assert "--layers 3,2, 8 tree rows, 4 pseudo rows a step: 2.00 tokens per step" in recommendation([ROW], 0.05)
    assert "| **3,2,1** | 5 | 0.50 0.20 0.10 | 0.80 0.60 0.40 | 8 | 4,4,0 | 2.00 | 1.25 | 1.60 |" in table([ROW])
    plain: SweepRow = {**ROW, "sizes": {"tree_rows": 1, "pseudo_rows": [0, 0, 0]}}
    assert "nothing is faster than plain decoding" in recommendation([plain], 0.9)
