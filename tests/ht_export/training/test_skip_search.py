"""The search of blocks to draft without."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ht_export.model.blocks import Blocks, read_skipped_blocks
from ht_export.model.checkpoint import BaseModel
from ht_export.model.skipping import block_weights
from ht_export.training import cli, skip_search
from ht_export.training.data import AnsweredPrompt
from ht_export.training.skip_search import (
    Found,
    SearchSettings,
    Sight,
    draft_cost,
    evaluate_blocks,
    look,
    passes,
    search,
)


def sight(right: str, sure: list[float] | None = None) -> Sight:
    found = np.array([one == "x" for one in right])
    return Sight(found, np.array(sure or [1.0] * len(found), dtype=np.float32))


@pytest.mark.parametrize(
    ("right", "sure", "most", "confidence", "expected"),
    [
        # The first token is the prompt's. Then x x: both right, and one more by the pass; then nothing is left.
        ("-xx-", None, 2, 0.0, (1, 3, 2)),
        # The draft is wrong at once: a token a pass, and as many drafted as there is text.
        ("----", None, 2, 0.0, (3, 3, 5)),
        # The second drafted token is unsure, and the last of its draft.
        ("-xxxx", [1, 1, 0.3, 1, 1], 4, 0.5, (2, 4, 3)),
        ("-xxxx", None, 8, 0.0, (1, 4, 4)),
        # A text of the prompt's token alone has no passes; there is nothing to divide by 0.
        ("x", None, 2, 0.0, (1, 1, 0)),
    ],
)
def test_passes_of_a_text(
    right: str, sure: list[float] | None, most: int, confidence: float, expected: tuple[int, int, int]
) -> None:
    assert passes([sight(right, sure)], most, confidence) == expected


def test_a_whole_model_agrees_with_its_own_text(base: BaseModel, sequences: list[AnsweredPrompt]) -> None:
    found = list(look(base, sequences[:3], Blocks()))
    assert [len(one.right) for one in found] == [len(one.answer) for one in sequences[:3]]
    assert np.concatenate([one.right for one in found]).mean() > 0.95
    assert all(((one.sure > 0) & (one.sure <= 1.0001)).all() for one in found)


def test_a_set_is_worth_what_it_is_with_the_tokens_and_confidence_that_are_given(base: BaseModel) -> None:
    text = [AnsweredPrompt("0", "", [1, 5], list(range(40, 60)))]
    settings = SearchSettings(draft_tokens=7, confidence=0.3)
    found = evaluate_blocks(base, text, Blocks(mlp=(1,)), 0.5, settings)
    assert (found.draft_tokens, found.confidence) == (7, 0.3)
    steps, tokens, drafted = passes(list(look(base, text, Blocks(mlp=(1,)))), 7, 0.3)
    assert found.speedup == tokens / (steps + drafted * 0.55)


def test_the_best_of_what_was_evaluated_is_found_within_the_budget(
    base: BaseModel, sequences: list[AnsweredPrompt]
) -> None:
    told: list[tuple[int, float]] = []
    settings = SearchSettings(budget=24)
    found, count = search(base, sequences[:2], settings, lambda number, best: told.append((number, best.speedup)))
    assert count <= 24
    assert [number for number, _ in told] == list(range(1, count + 1))
    assert found.speedup == max(speedup for _, speedup in told)
    assert len(found.blocks.attention) < 4
    again, _ = search(base, sequences[:2], settings)
    assert again == found


def test_what_is_known_is_not_evaluated_again_and_changes_nothing(
    base: BaseModel, sequences: list[AnsweredPrompt]
) -> None:
    kept: list[Found] = []
    settings = SearchSettings(budget=16)
    whole, count = search(base, sequences[:2], settings, keep=kept.append)
    assert len(kept) == count
    known = {frozenset(found.blocks.chosen): found for found in kept[:10]}
    more: list[Found] = []
    again, counted = search(base, sequences[:2], settings, known=known, keep=more.append)
    assert (again, counted) == (whole, count)
    assert more == kept[10:]


def test_a_draft_costs_the_weights_that_it_reads(base: BaseModel) -> None:
    weights = block_weights(base.model)
    assert draft_cost(base, weights, frozenset()) == 1.0
    everything = draft_cost(base, weights, frozenset(weights))
    assert 0 < everything < draft_cost(base, weights, frozenset([("mlp", 0)])) < 1


def test_the_command_writes_a_file_for_the_model(
    tiny_checkpoint: Path,
    base: BaseModel,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "blocks.json"
    command = ["skip-blocks", str(tiny_checkpoint), "--data", str(data_folder), "--texts", "2", "--out", str(out)]
    assert cli.main([*command, "--budget", "9", "--confidence", "0.25"]) == 0
    assert "(9 sets evaluated)" in capsys.readouterr().err
    found = read_skipped_blocks(out, base.identity())
    assert found.confidence == 0.25
    assert found.search["budget"] == 9
    assert json.loads(out.read_text())["search"]["texts"] <= 2
    other = tmp_path / "other.json"
    other.write_text("[]")
    for options, message in (
        (["--budget", "0"], "--budget must be at least 1, not 0"),
        (["--row-cost", "-1"], "--row-cost must be at least 0, not -1"),
        (["--draft-tokens", "0"], "--draft-tokens must be"),
        (["--confidence", "2"], "--confidence must be from 0 to 1, not 2"),
        (["--out", str(other)], "other.json"),
    ):
        assert cli.main([*command, *options]) == 1
        assert message in capsys.readouterr().err
    assert other.read_text() == "[]"


class KilledError(Exception):
    """Stands for a signal."""


def test_a_search_goes_on_where_it_was_killed(
    tiny_checkpoint: Path,
    base: BaseModel,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["skip-blocks", str(tiny_checkpoint), "--data", str(data_folder), "--texts", "2", "--budget", "12"]
    assert cli.main([*command, "--out", str(tmp_path / "whole.json")]) == 0
    out = tmp_path / "blocks.json"
    evaluated: list[Blocks] = []
    killed_at = 5

    def counted(base: BaseModel, data: object, blocks: Blocks, *rest: Any) -> Found:
        if len(evaluated) == killed_at:
            raise KilledError
        evaluated.append(blocks)
        return evaluate_blocks(base, data, blocks, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(skip_search, "evaluate_blocks", counted)
    with pytest.raises(KilledError):
        cli.main([*command, "--out", str(out)])
    assert not out.exists()
    killed_at = -1
    assert cli.main([*command, "--out", str(out)]) == 0
    assert len(evaluated) == len(set(evaluated)) == 12
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    # More sets of a finished search, and none of another one.
    assert cli.main([*command, "--out", str(out), "--budget", "15"]) == 0
    assert len(evaluated) == 15
    capsys.readouterr()
    assert cli.main([*command, "--out", str(out), "--row-cost", "0.5"]) == 1
    error = capsys.readouterr().err
    assert "blocks.json.checkpoint is the record of a search with another row_cost (0.05, now 0.5)" in error
    (tmp_path / "blocks.json.checkpoint").write_text("{}")
    assert cli.main([*command, "--out", str(out)]) == 1
    assert "delete it to search from the beginning" in capsys.readouterr().err
    assert read_skipped_blocks(out, base.identity()).search["budget"] == 15
