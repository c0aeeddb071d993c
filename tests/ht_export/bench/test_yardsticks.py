"""Ours beside other ways, in one table."""

from typing import Any

import pytest

from ht_export.bench.summary import summarise
from ht_export.bench.yardsticks import yardsticks

from .rows import differing, row, runs
from .test_table import CONDITIONS

MEDUSA = {"file": "medusa.onnx", "drafter": "medusa", "transfer_layers": [30, 30, 30]}
ASKED = {
    **CONDITIONS,
    "command": "ht-bench run engine.onnx --prompts prompts.jsonl",
    "compared": {"medusa": MEDUSA},
    "early_exit": 10,
    "self_speculative": {"attention": [1, 2], "mlp": [3], "draft_tokens": 4, "confidence": 0.5},
}


def lines(*rows: Any, **changes: Any) -> list[str]:
    return yardsticks({"conditions": {**ASKED, **changes}, **summarise(rows)}).split("\n")


def test_each_way_has_how_many_times_as_fast_ours_is_and_its_own_tokens_per_step() -> None:
    found = lines(
        row("0", "b", speculative=runs(20.0, steps=[5]), medusa=runs(16.0, steps=[8])),
        row("1", "a", medusa=runs(10.0)),
    )
    table = [line.split(" | ") for line in found if line.startswith("|")]
    assert [cell.strip(" |") for cell in table[0]] == ["task", "prompts", "ours, tokens per step", "plain", "medusa"]
    cells = {one[0].strip(" |"): [cell.strip(" |") for cell in one[1:]] for one in table[2:]}
    assert cells == {
        "**overall**": ["2", "1.33", "1.75 (1.00)", "1.35 (1.11)"],
        "a": ["1", "1.00", "1.50 (1.00)", "1.50 (1.00)"],
        "b": ["1", "2.00", "2.00 (1.00)", "1.25 (1.25)"],
        "texts equal": ["", "2 of 2", "2 of 2", "2 of 2"],
    }


def test_ways_of_transformers_are_measured_by_their_own_plain_decoding_too() -> None:
    one = row(transformers=runs(5.0), early_exit=runs(6.0, steps=[5], identical=None))
    found = summarise([one])["overall"]["ratios"]
    assert found["early_exit"] == {"speed": 2.5, "speedup": pytest.approx(1.25)}
    assert found["plain"] == {"speed": 1.5, "speedup": 1.5}
    text = "\n".join(lines(one))
    assert " 1.25; 2.50 (2.00) |" in text
    assert "`transformers` early exit" in text


def test_settings_and_command_are_told() -> None:
    text = "\n".join(lines(row(self_speculative=differing(wrong=True))))
    assert "`ht-bench run engine.onnx --prompts prompts.jsonl`" in text
    assert "Some-Model, float32 (engine.onnx), Some CPU, 2 threads, batch 1, greedy, 2 prompts" in text
    assert "drafts without 2 attention and 1 MLP blocks, up to 4 tokens in a row until one has less than 0.5." in text
    assert "Early exit: drafts of the first 10 layers." in text
    assert "medusa: medusa.onnx, Medusa heads at 30, 30, 30." in text
    assert "0 of 1, 1 wrong" in text


def test_nothing_measured_is_no_table() -> None:
    assert not any(line.startswith("|") for line in lines())
