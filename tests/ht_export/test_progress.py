"""What is shown of long work."""

import re

import pytest

from ht_export.progress import stage_display


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
