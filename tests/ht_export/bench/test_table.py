from typing import Any

from ht_export.bench.summary import summarise
from ht_export.bench.table import to_markdown

from .rows import differing, row, runs

CONDITIONS: dict[str, Any] = {
    "commit": "abc1234",
    "date": "2026-12-01",
    "model": "Some-Model",
    "precision": "float32",
    "device": "Some CPU, 2 threads",
    "engine": {"file": "engine.onnx", "tree": {"adaptive": False, "tree_rows": 4, "pseudo_rows": [4, 2, 2]}},
    "prompts": {"file": "prompts.jsonl", "count": 2, "tasks": "all"},
    "max_new_tokens": 128,
    "repeats": 3,
    "sampling": {"temperature": 0.0, "top_p": None, "repetition_penalty": 1.0, "seeds": []},
}


def markdown(*rows: Any, **changes: Any) -> str:
    return to_markdown({"conditions": {**CONDITIONS, **changes}, **summarise(rows)})


def test_the_tables_say_under_which_conditions() -> None:
    first, *_ = markdown(row()).split("\n\n")
    assert first == (
        "Some-Model, float32 (engine.onnx), Some CPU, 2 threads, batch 1, greedy, 2 prompts of prompts.jsonl, "
        "128 new tokens, trees of 4 rows with 4, 2, 2 pseudo rows, median of 3, commit abc1234, 2026-12-01"
    )
    adaptive = {"file": "engine.onnx", "tree": {"adaptive": True, "tuning": "quick"}}
    assert "128 new tokens, trees of adaptive size (quick tuning), median" in markdown(row(), engine=adaptive)
    sampling = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.0, "seeds": [0, 1, 2]}
    assert "temperature 0.8, top p 0.9, seeds 0 to 2, 2 prompts" in markdown(row(), sampling=sampling)


def test_the_main_table_has_a_line_overall_and_for_each_task() -> None:
    table = markdown(row("0", "b", speculative=runs(20.0, steps=[5])), row("1", "a"), row("2", "")).split("\n\n")[1]
    assert table.splitlines() == [
        "| task        | prompts | speed-up over plain | decode only | tokens per step | tokens/s | plain tokens/s | "
        "first token, ms | plain, ms |",
        "| ----------- | ------: | ------------------: | ----------: | --------------: | -------: | -------------: | "
        "--------------: | --------: |",
        "| **overall** |       3 |                1.67 |        1.67 |            1.20 |     16.7 |           10.0 | "
        "            250 |       250 |",
        "| (none)      |       1 |                1.50 |        1.50 |            1.00 |     15.0 |           10.0 | "
        "            250 |       250 |",
        "| a           |       1 |                1.50 |        1.50 |            1.00 |     15.0 |           10.0 | "
        "            250 |       250 |",
        "| b           |       1 |                2.00 |        2.00 |            2.00 |     20.0 |           10.0 | "
        "            250 |       250 |",
    ]


def test_other_ways_have_tables_of_speed_up_and_tokens_per_step() -> None:
    text = markdown(row(medusa=runs(12.0, steps=[8]), transformers=runs(4.0)))
    assert "| plain / `transformers` |" in text
    speedups, tokens = (part.splitlines() for part in text.split("\n\n") if "speculative | medusa | `transf" in part)
    assert speedups[-1].split()[1::2] == ["a", "1.50", "1.20", "0.40"]
    assert tokens[-1].split()[1::2] == ["a", "1.00", "1.25", "1.00"]


def test_acceptance_is_by_depth_for_tasks_and_for_other_ways_overall() -> None:
    text = markdown(
        row("0", "a", speculative=runs(15.0, accepted=[50, 30, 20]), medusa=runs(12.0, accepted=[3, 1])),
        row("1", "b", speculative=runs(15.0, accepted=[4]), medusa=runs(12.0)),
    )
    lines = (
        text.split("Steps that accepted so many drafted tokens, of those that accepted one less:\n\n")[1]
        .split("\n\n")[0]
        .splitlines()
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["task", "1", "2"]
    assert cells[2:] == [
        ["**overall**", "0.48", "0.40"],
        ["a", "0.50", "0.40"],
        ["b", "-", "-"],
        ["medusa", "0.25", "-"],
    ]


def test_spread_slowest_prompt_and_checks_are_told_in_words() -> None:
    slow = row("7", "b", speculative=differing(wrong=True), plain=runs(20.0))
    tie = row("8", "b", seed=4, speculative=differing(wrong=False, gap=None, position=9))
    text = markdown(row(), slow, tie)
    assert "Speed-up by repeat: 1.12 to 1.12 (3 repeats). Slowest prompt: 7 (b), 0.75." in text
    assert text.endswith(
        "- plain: 3 of 3 texts are the same in every repeat\n"
        "- speculative: 1 of 3 texts are that of plain decoding; **1 wrong**\n"
        "  - 7: differs at new token 3 (gap 0.5; wrong)\n"
        "  - 8, seed 4: differs at new token 9 (not possible; allowed)"
    )


def test_of_many_differences_the_first_ones_are_shown() -> None:
    text = markdown(*(row(str(number), speculative=differing(wrong=True)) for number in range(8)))
    assert text.count("differs at") == 5
    assert text.endswith("  - and 3 more")


def test_a_name_cannot_break_the_table() -> None:
    assert "| a\\|b " in markdown(row(task="a|b"))
