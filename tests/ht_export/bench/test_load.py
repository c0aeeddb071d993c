"""`ht-bench load`: arrivals, what is measured of many requests at once, and the check of their texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ht_export.bench import cli
from ht_export.bench.load import check as check_module
from ht_export.bench.load.arrivals import poisson, trace
from ht_export.bench.load.measure import Answered, Run, run
from ht_export.bench.load.summary import summarise, to_markdown
from ht_export.bench.settings import Job
from runtime import Generator, InputError, Sampling


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    texts = ["Hello", "The sky is blue", "Why?", "xyz" * 9]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def load(*arguments: object) -> int:
    return cli.main(["load", *map(str, arguments), "--threads", "1", "--quiet"])


@pytest.mark.parametrize(
    "when", [["--clients", "1,3"], ["--rate", "200"], ["--trace", "trace"], ["--clients", "2", "--temperature", "0.8"]]
)
def test_every_text_under_load_is_the_text_alone(
    tiny_engine: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], when: list[str]
) -> None:
    (tmp_path / "trace").write_text('{"time": 0.02}\n{"time": 0}\n{"time": 0.01}\n')
    when = [str(tmp_path / "trace") if word == "trace" else word for word in when]
    out, plot = tmp_path / "load.json", tmp_path / "load.png"
    options = ["--prompts", prompts, "--requests", 6, "--max-new-tokens", 12, "--repeats", 2]
    assert load(tiny_engine, *options, *when, "--json", out, "--plot", plot) == 0
    found = json.loads(out.read_text())
    assert (found["format"], found["version"]) == ("ht-bench-load", 1)
    check = found["check"]
    assert not check["wrong"]
    assert check["texts"] == check["same"] + len(check["ties"]) > 0
    for level in found["levels"]:
        for way in level["ways"].values():
            assert way["tokens_per_second"] > 0
            assert way["first_token_s"]["median"] <= way["first_token_s"]["p99"]
        assert level["ways"]["plain"]["passes_with_several_trees"] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "| plain |" in table
    assert f"{check['texts']} texts: {check['same']} are those of plain decoding alone" in table


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--clients", "0"], "--clients must be at least 1"),
        (["--requests", "0"], "--requests must be at least 1"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--rate", "0"], "--rate must be from 0.001"),
        (["--trace", "missing.jsonl"], "no trace at missing.jsonl"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--json", "/dev/null/load.json"], "/dev/null"),
    ],
)
def test_a_mistake_is_one_line(
    tiny_engine: Path, prompts: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert load(tiny_engine, "--prompts", prompts, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("ht-bench: error: ")
    assert error.count("\n") == 1
    assert told in error


def test_a_prompt_too_long_is_told_before_anything_runs(
    tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 300, "id": "long"}) + "\n")
    assert load(tiny_engine, "--prompts", path, "--clients", "1") == 1
    assert "prompt long: the prompt has" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", '{"time": -1}\n', '{"time": "soon"}\n', '{"at": 1}\n', "[\n"])
def test_a_trace_that_does_not_fit_is_one_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="'time'"):
        trace(path, None)


def test_arrivals_at_a_rate_are_those_of_their_seed() -> None:
    found = poisson(5.0, 2000, 3)
    assert found == poisson(5.0, 2000, 3)
    assert found.times != poisson(5.0, 2000, 4).times
    assert list(found.times) == sorted(found.times)
    gaps = np.diff(found.times)
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)


def test_quantiles_and_speed_are_those_of_the_requests() -> None:
    counted = {"decode_passes": 10, "tree_passes": 3, "prompt_passes": 2, "preemptions": 1}
    answers = [
        Answered(0, [1, 2, 3], 0.5, [0.1, 0.1], (1, 1)),
        Answered(1, [1, 2], 1.5, [0.3], (1,)),
    ]
    found = summarise([Run(answers, 1, 2.5, [(0.1, 2, 0), (0.2, 1, 4)], counted)])
    assert found["tokens_per_second"] == 2.0
    assert found["first_token_s"]["median"] == 1.0
    assert found["between_tokens_s"]["median"] == pytest.approx(0.1)
    assert (found["most_waiting"], found["mean_running"], found["refused"]) == (4, 1.5, 1)
    # Two steps of one token, one of two.
    assert found["tokens_per_step"] == pytest.approx(4 / 3)


def test_a_text_that_is_not_that_of_its_request_alone_is_wrong(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(tiny_engine, threads=1, adapt=False, prefix_cache_bytes=0)
    job = Job("one", "", "Hello", Sampling())
    alone = generator.generate("Hello", max_new_tokens=6, speculate=False).tokens
    other = [*alone[:3], (alone[3] + 1) % 264]
    runs = [("1 client", "plain", Run([Answered(0, alone, 0.1, [], ()), Answered(0, other, 0.1, [], ())]))]
    found = check_module.check_texts(generator, [job], [alone], runs)
    assert (found["texts"], found["same"], found["ties"]) == (2, 1, [])
    assert [one["position"] for one in found["wrong"]] == [3]
    assert found["wrong"][0]["gap"] > 1e-4
    monkeypatch.setattr(check_module, "TIE", 1e9)
    assert len(check_module.check_texts(generator, [job], [alone], runs)["ties"]) == 1
    results: dict[str, Any] = {
        "conditions": {
            **dict.fromkeys(("model", "precision", "device", "date"), "x"),
            **dict.fromkeys(("requests", "max_new_tokens", "max_batch", "seed", "repeats"), 1),
            "commit": None,
            "prompts": {"count": 1, "file": "p"},
        },
        "levels": [],
        "check": found,
    }
    assert "- wrong one, 1 client, plain: new token 3, gap" in to_markdown(results)


def test_requests_that_the_queue_has_no_room_for_are_counted(tiny_engine: Path) -> None:
    generator = Generator(tiny_engine, threads=1, adapt=False, max_batch=1, max_queue=1, prefix_cache_bytes=0)
    jobs = [Job(str(index), "", "Hello", Sampling()) for index in range(6)]
    found = run(generator, poisson(1e5, 6, 0), jobs, {"max_new_tokens": 30})
    assert found.refused > 0
    assert len(found.answers) + found.refused == 6
