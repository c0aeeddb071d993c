"""Bars and lines that long work shows."""

import re

import pytest

from ht_export import progress
from ht_export.progress import progress_bar, stage_display


def test_a_log_has_a_line_for_each_stage_when_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_display() as stage:
        with stage("tracing the graph") as tell:
            tell("half of it")
            assert not capsys.readouterr().err
        assert re.fullmatch(r"tracing the graph: \d+\.\d s\n", capsys.readouterr().err)
        with pytest.raises(ValueError), stage("checking the graph"):
            raise ValueError
    assert not capsys.readouterr().err


def test_a_terminal_has_every_stage_and_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with stage_display() as stage, stage("building the plan") as tell:
        tell("layer 3 of 8")
    shown = capsys.readouterr().err
    assert "building the plan" in shown
    assert "✓" in shown


def test_a_log_has_a_line_of_counted_work_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar() as bar:
        task = bar.add_task("training", total=9)
        bar.advance(task)
        assert re.fullmatch(r"training 1/9 0:00:00 \S+\n", capsys.readouterr().err)
        bar.advance(task)
        assert not capsys.readouterr().err
        monkeypatch.setattr(progress, "LOG_EVERY", 0)
        bar.update(task, completed=7)
        assert "training 7/9" in capsys.readouterr().err
    capsys.readouterr()
    with progress_bar(disable=True) as bar:
        bar.advance(bar.add_task("training", total=9))
    assert not capsys.readouterr().err
