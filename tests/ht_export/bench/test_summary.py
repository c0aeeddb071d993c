import json

import pytest

from ht_export.bench.summary import acceptance, summarise

from .rows import differing, row, runs


def test_a_speed_up_is_the_ratio_of_mean_speeds_and_not_the_mean_of_ratios() -> None:
    rows = [
        row("0", plain=runs(10.0), speculative=runs(30.0)),
        row("1", plain=runs(40.0), speculative=runs(40.0)),
    ]
    overall = summarise(rows)["overall"]
    assert overall["speedup"] == pytest.approx(35 / 25)
    assert overall["decode_speedup"] == pytest.approx(70 / 50)
    assert (overall["tokens_per_second"], overall["plain_tokens_per_second"]) == (35.0, 25.0)


def test_a_prompts_figure_is_the_median_over_its_repeats() -> None:
    slow_once = row(plain=runs([10.0, 10.0, 1.0]), speculative=runs([2.0, 20.0, 21.0]))
    overall = summarise([slow_once])["overall"]
    assert overall["speedup"] == 2.0
    assert overall["speedup_range"] == [0.2, 21.0]


def test_the_range_is_of_speed_ups_over_all_prompts_of_one_repeat() -> None:
    rows = [
        row("0", plain=runs([10.0, 10.0]), speculative=runs([30.0, 20.0])),
        row("1", plain=runs([10.0, 30.0]), speculative=runs([10.0, 40.0])),
    ]
    assert summarise(rows)["overall"]["speedup_range"] == [pytest.approx(1.5), pytest.approx(2.0)]


def test_tokens_per_step_weighs_steps_and_counts_the_prompts() -> None:
    rows = [
        row("0", speculative=runs(15.0, new_tokens=[100], steps=[40])),
        row("1", speculative=runs(15.0, new_tokens=[2], steps=[2])),
    ]
    overall = summarise(rows)["overall"]
    assert overall["tokens_per_step"] == pytest.approx(102 / 42)
    assert overall["ways"]["plain"]["tokens_per_step"] == 1.0


def test_acceptance_is_given_that_the_depth_before_was_accepted() -> None:
    assert acceptance([50, 30, 20]) == [0.5, 0.4]
    assert acceptance([5]) == acceptance([]) == []


def test_steps_of_all_prompts_and_repeats_count_alike_for_acceptance() -> None:
    rows = [
        row("0", speculative=runs(15.0, accepted=[40, 10])),
        row("1", speculative=runs(15.0, accepted=[10, 20, 20])),
    ]
    overall = summarise(rows)["overall"]
    assert overall["ways"]["speculative"]["accepted"] == [50, 30, 20]
    assert overall["acceptance"] == [0.5, 0.4]


def test_an_answer_of_one_token_has_no_decoding_speed() -> None:
    one = {"new_tokens": [1], "steps": [1], "decode_tokens_per_second": [0.0]}
    short = row("0", plain=runs(5.0, **one), speculative=runs(5.0, **one))
    long = row("1", plain=runs(10.0), speculative=runs(20.0))
    assert summarise([short, long])["overall"]["decode_speedup"] == 2.0
    assert summarise([short])["overall"]["decode_speedup"] is None


def test_tasks_have_the_figures_that_overall_has() -> None:
    rows = [
        row("0", task="b", speculative=runs(30.0), transformers=runs(5.0)),
        row("1", task="a", speculative=runs(10.0), transformers=runs(4.0)),
        row("2", task="a", speculative=runs(20.0), transformers=runs(4.0)),
    ]
    found = summarise(rows)
    assert {name: task["speedup"] for name, task in found["tasks"].items()} == {"a": 1.5, "b": 3.0}
    assert found["tasks"]["a"].keys() == found["overall"].keys()
    wanted = {"speedup", "decode_speedup", "tokens_per_step", "plain_tokens_per_second", "tokens_per_second"}
    assert wanted | {"transformers_tokens_per_second"} <= found["overall"].keys()
    assert found["tasks"]["a"]["transformers_tokens_per_second"] == 4.0
    assert found["tasks"]["a"]["plain_over_transformers"] == 2.5
    json.dumps(found, allow_nan=False)


def test_without_transformers_its_figures_are_none() -> None:
    overall = summarise([row()])["overall"]
    assert overall["transformers_tokens_per_second"] is None
    assert overall["plain_over_transformers"] is None


def test_every_seed_is_an_answer_of_its_prompt() -> None:
    rows = [row(id, seed=seed) for id in "ab" for seed in (4, 5, 6)]
    overall = summarise(rows)["overall"]
    assert (overall["prompts"], overall["answers"]) == (2, 6)


def test_the_slowest_prompt_is_named() -> None:
    rows = [row("0"), row("1", task="b", speculative=runs([9.0, 8.0, 7.0]), plain=runs([10.0] * 3)), row("2")]
    assert summarise(rows)["overall"]["slowest"] == {"id": "1", "task": "b", "seed": None, "speedup": 0.8}


def test_other_ways_are_measured_against_plain_decoding_in_the_engine() -> None:
    rows = [row(medusa=runs(12.0), without_ngrams=runs(13.0, steps=[8]), speculative=runs(15.0, steps=[5]))]
    overall = summarise(rows)["overall"]
    assert overall["ways"]["medusa"]["speedup"] == 1.2
    assert overall["tokens_per_step"] == 2.0
    assert overall["tokens_per_step_without_ngrams"] == 1.25


def test_texts_that_differ_are_listed_and_counted_where_they_are_wrong() -> None:
    not_compared = runs(1.0, identical=None)
    rows = [
        row("0", speculative=differing(wrong=True), transformers=not_compared),
        row("1", speculative=differing(wrong=False, gap=1e-6), transformers=not_compared),
        row("2", transformers=not_compared),
    ]
    checks = summarise(rows)["checks"]
    assert checks.keys() == {"plain", "speculative"}
    assert checks["plain"] == {"answers": 3, "identical": 3, "wrong": 0, "differences": []}
    assert checks["speculative"] == {
        "answers": 3,
        "identical": 1,
        "wrong": 1,
        "differences": [
            {"id": "0", "task": "a", "seed": None, "position": 3, "gap": 0.5, "wrong": True},
            {"id": "1", "task": "a", "seed": None, "position": 3, "gap": 1e-6, "wrong": False},
        ],
    }


def test_of_no_rows_there_is_nothing_to_say() -> None:
    assert summarise([]) == {"overall": {}, "tasks": {}, "checks": {}}
