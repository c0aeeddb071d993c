"""Bars and lines that long work shows."""

import re

import pytest

from ht_export import progress
from ht_export.progress import one_display, progress_bar, stage_display


def test_a_log_has_a_line_for_each_stage_when_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_display() as stage:
        with stage("tracing the graph") as tell:
            tell("half of it")
            assert not capsys.readouterr().err
        assert re.fullmatch(r"tracing the graph: \d+\.\d s\n", capsys.readouterr().err)
        with pytest.raises(ValueError), stage("checking the graph"):
            raise ValueError
    assert not capsys.readouterr().err


def test_a_log_has_a_line_of_a_long_stage_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY", 0)
    with stage_display() as stage, stage("compiling kernels") as tell:
        tell("12 of 102")
        assert capsys.readouterr().err == "compiling kernels: 12 of 102\n"


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


def test_bars_and_stages_of_a_whole_share_one_display(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with one_display("everything", 2) as whole:
        whole.begin("first: [not markup] " + "long " * 60)
        with progress_bar() as bar:
            first = bar.add_task("training", total=9)
            bar.advance(first)
        whole.begin("second")
        with stage_display() as stage, stage("building"), progress_bar() as other:
            assert other is bar
            assert [task.description for task in other.tasks] == ["everything", "building"]
            assert other.tasks[0].completed == 1
        assert len(bar.tasks) == 1
    assert bar.tasks[0].completed == 2
    assert "first: [not markup] " + "long " * 60 in capsys.readouterr().err
    with progress_bar() as alone:
        assert alone is not bar


def test_a_whole_that_fails_leaves_no_display_behind() -> None:
    with pytest.raises(ValueError), one_display("everything", 1):
        raise ValueError
    with progress_bar() as bar:
        assert not bar.tasks
