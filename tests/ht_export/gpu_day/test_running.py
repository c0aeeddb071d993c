"""A day's stages: each in a process of its own, within the time, whatever fails; and it goes on where it stopped."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from ht_export.gpu_day.results import FILE, DayResults
from ht_export.gpu_day.running import RESERVE, Outcome, run_stages
from ht_export.gpu_day.settings import DaySettings
from ht_export.gpu_day.stages import PARTS, STAGES, Stage, chosen
from runtime.errors import InputError
from tests.ht_export.gpu_day.scripted import ran, stage


@pytest.fixture
def settings(tmp_path: Path) -> DaySettings:
    return DaySettings(tmp_path / "work", tmp_path / "results", "cpu")


def run(settings: DaySettings, *stages: Stage, seconds: float = 120.0) -> tuple[Outcome, dict[str, Any], list[str]]:
    """Run stages as a command does anew; return what became of them, what is on the disk, and what was said."""
    said: list[str] = []
    results = DayResults(settings.results, settings.device)
    results.begin({"began": time.time()})
    outcome = run_stages(stages, settings, results, seconds, said.append)
    return outcome, json.loads((settings.results / FILE).read_text())["stages"], said


def test_a_stage_that_goes_well_is_done_once(settings: DaySettings) -> None:
    outcome, found, _ = run(settings, stage("right"))
    assert (outcome.complete, outcome.left) == (("right",), {})
    assert found["right"]["complete"]
    assert found["right"]["sections"]["first"]["process"] == found["right"]["sections"]["second"]["process"]
    _, _, said = run(settings, stage("right"))
    assert said == ["right: done before"]
    assert ran(settings) == ["first", "second"]


def test_after_a_section_that_failed_a_new_process_goes_on(settings: DaySettings) -> None:
    outcome, found, _ = run(settings, stage("broken"), stage("right"))
    sections = found["broken"]["sections"]
    assert sections["wrong"]["error"] == "RuntimeError: SM 90 is refused"
    assert sections["before"]["process"] != sections["after"]["process"]
    assert outcome.complete == ("right",)
    assert outcome.left == {"broken": "wrong failed"}


def test_what_failed_is_tried_again_and_nothing_else(settings: DaySettings) -> None:
    run(settings, stage("broken"))
    run(settings, stage("broken"))
    (settings.work / "mended").touch()
    outcome, found, _ = run(settings, stage("broken"))
    assert ran(settings) == ["before", "wrong", "after", "wrong", "wrong"]
    assert outcome.complete == ("broken",)
    assert "error" not in found["broken"]["sections"]["wrong"]


def test_a_process_that_ends_leaves_the_sections_after_it(settings: DaySettings) -> None:
    outcome, found, _ = run(settings, stage("crashing"))
    assert found["crashing"]["sections"]["crash"] == {"error": "its process ended with status 3"}
    assert "process" in found["crashing"]["sections"]["after"]
    assert outcome.left == {"crashing": "crash failed"}


def test_a_section_that_hangs_is_stopped_at_the_limit_of_its_stage(settings: DaySettings) -> None:
    begun = time.monotonic()
    outcome, found, _ = run(settings, stage("hanging", limit=8), stage("right"))
    assert time.monotonic() - begun < 60
    assert found["hanging"]["sections"]["hang"]["error"].startswith("stopped after")
    assert "process" in found["hanging"]["sections"]["before"]
    assert "hang was stopped" in outcome.left["hanging"]
    assert outcome.complete == ("right",)
    # The next run does what comes after it first.
    run(settings, stage("hanging", limit=8))
    assert ran(settings) == ["before", "first", "second", "after"]


def test_no_stage_begins_that_has_too_little_time(settings: DaySettings) -> None:
    outcome, found, _ = run(settings, stage("right", least=30), seconds=RESERVE + 10)
    assert outcome.complete == ()
    assert outcome.left["right"].endswith("s were left, and it needs 30")
    assert found == {}


def test_what_is_not_here_is_looked_for_again_and_what_no_cpu_can_is_not(settings: DaySettings) -> None:
    outcome, found, _ = run(settings, stage("lacking"))
    assert found["lacking"]["sections"]["needed"]["skipped"] == "the weights are not here"
    assert found["lacking"]["sections"]["gpu"]["not_on_a_cpu"] == "executing a plan"
    assert outcome.left == {"lacking": "needed skipped"}
    (settings.work).mkdir(exist_ok=True)
    (settings.work / "carried").touch()
    outcome, _, _ = run(settings, stage("lacking"))
    assert outcome.complete == ("lacking",)


def test_a_stage_that_cannot_be_imported_says_so(settings: DaySettings) -> None:
    outcome, found, _ = run(settings, stage("unimportable"))
    assert outcome.left == {"unimportable": "ModuleNotFoundError: No module named 'triton'"}
    assert found["unimportable"]["stopped"] == outcome.left["unimportable"]


def test_results_say_that_they_are_of_a_rehearsal(settings: DaySettings) -> None:
    _, found, _ = run(settings, stage("right"))
    whole = json.loads((settings.results / FILE).read_text())
    assert (whole["device"], whole["rehearsal"]) == ("cpu", True)
    assert (found["right"]["device"], found["right"]["rehearsal"]) == ("cpu", True)
    with pytest.raises(InputError, match="has results of the device cpu, and this run is on cuda"):
        DayResults(settings.results, "cuda")


@pytest.mark.parametrize("content", ["", "[]", '{"version": 0}', "[" * 100_000])
def test_what_is_no_result_is_one_error(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(InputError, match="name another --results"):
        DayResults(tmp_path, "cpu")


def test_files_come_back_in_pieces_and_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ht_export.gpu_day.results.MOST_BYTES", 100)
    results = DayResults(tmp_path / "results", "cpu")
    checkpoint, layers = tmp_path / "fit.checkpoint", tmp_path / "transfer.safetensors"
    checkpoint.write_bytes(bytes(range(250)))
    results.keep([checkpoint])
    assert all(path.stat().st_size <= 100 for path in results.folder.glob("fit*"))
    again = DayResults(tmp_path / "results", "cpu")
    assert again.restore(tmp_path / "work") == ["fit.checkpoint"]
    assert (tmp_path / "work/fit.checkpoint").read_bytes() == checkpoint.read_bytes()
    # What is not kept any more is gone.
    layers.write_bytes(b"weights")
    again.keep([layers])
    assert sorted(path.name for path in results.folder.iterdir()) == [FILE, "transfer.safetensors"]


def test_parts_are_chosen_by_number_and_by_name() -> None:
    assert chosen(None) == list(STAGES)
    assert {one.part for one in chosen("1,3")} == {1, 3}
    assert [one.name for one in chosen("end-to-end, kernel")] == ["kernel", "end-to-end"]
    assert {one.part for one in STAGES} == set(PARTS)
    with pytest.raises(ValueError, match="'6' is no part: 1 \\(kernel\\)"):
        chosen("1,6")
