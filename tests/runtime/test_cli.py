import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from runtime import Generator, Sampling
from runtime.cli import build_parser, main, sampling_of
from runtime.program import run


def test_json_is_one_object_with_the_results_names(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_engine), "Hello", "--json", "--max-new-tokens", "9", "--threads", "1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = Generator(tiny_engine, threads=1).generate("Hello", max_new_tokens=9).to_dict()
    assert printed.keys() == expected.keys()
    assert printed["tokens"] == expected["tokens"]
    assert printed["text"] == expected["text"]


def test_plain_and_raw_are_passed_on(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tiny_engine), "Hello", "--json", "--plain", "--raw", "--max-new-tokens", "9"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 9
    assert printed["prompt_tokens"] == len("Hello")


def test_escaping_is_passed_on(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for options in ([], ["--escape-special-tokens"]):
        main([str(tiny_engine), "Hi</s>", "--json", "--max-new-tokens", "1", *options])
        counts.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    # A token for each of the four bytes, instead of one for all.
    assert counts[1] == counts[0] + 3


def test_text_goes_to_stdout_and_statistics_to_stderr(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tiny_engine), "Hello", "--max-new-tokens", "9"])
    captured = capsys.readouterr()
    assert captured.out == Generator(tiny_engine).generate("Hello", max_new_tokens=9).text
    assert "tokens per step" in captured.err
    assert "tokens/s" in captured.err
    assert "first token after" in captured.err


def test_a_dash_reads_the_prompt_from_stdin(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    main([str(tiny_engine), "-", "--json", "--raw", "--max-new-tokens", "3"])
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len("Hello")


def test_a_users_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "engine.onnx"), "Hello"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ht-generate: error: no engine at")
    assert captured.err.count("\n") == 1


def test_a_file_that_cannot_be_read_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        Path("/").read_text()

    assert run("ht-x", work, interrupted="") == 1
    assert capsys.readouterr().err == "ht-x: error: /: Is a directory\n"


def test_an_unknown_option_is_refused(tiny_engine: Path) -> None:
    with pytest.raises(SystemExit):
        main([str(tiny_engine), "Hello", "--no-such-option"])


def test_sampling_options_are_passed_on(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "--temperature 1.1 --top-k 90 --top-p 0.95 --min-p 0.001 --repetition-penalty 1.2 --presence-penalty 0.3 "
        "--frequency-penalty -0.2 --logit-bias 40=2.5 --logit-bias 41=-3 --ban 50 --ban 51 --force 0=70 --force 2=71 "
        "--min-new-tokens 5 --seed 18446744073709551615 --logprobs 2"
    )
    assert main([str(tiny_engine), "Hello", "--json", "--max-new-tokens", "20", *line.split()]) == 0
    printed = json.loads(capsys.readouterr().out)
    sampling = Sampling(
        temperature=1.1,
        top_k=90,
        top_p=0.95,
        min_p=0.001,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=-0.2,
        logit_bias={40: 2.5, 41: -3},
        banned_tokens=[50, 51],
        forced_tokens={0: 70, 2: 71},
        min_new_tokens=5,
        seed=2**64 - 1,
        logprobs=2,
    )
    expected = json.loads(
        json.dumps(Generator(tiny_engine).generate("Hello", max_new_tokens=20, sampling=sampling).to_dict())
    )
    for name in ("tokens", "seed", "log_probabilities", "accepted"):
        assert printed[name] == expected[name]


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("--temperature 0.5", "temperature", 0.5),
        ("--temperature 1 --top-k 7", "top_k", 7),
        ("--temperature 1 --top-p 0.5", "top_p", 0.5),
        ("--temperature 1 --min-p 0.5", "min_p", 0.5),
        ("--repetition-penalty 1.5", "repetition_penalty", 1.5),
        ("--presence-penalty -1.5", "presence_penalty", -1.5),
        ("--frequency-penalty 1.5", "frequency_penalty", 1.5),
        ("--logit-bias 4=-1.5 --logit-bias 5=2", "logit_bias", {4: -1.5, 5: 2.0}),
        ("--ban 4 --ban 5", "banned_tokens", (4, 5)),
        ("--force 0=4 --force 1=5", "forced_tokens", {0: 4, 1: 5}),
        ("--min-new-tokens 3", "min_new_tokens", 3),
        ("--seed 3", "seed", 3),
        ("--json --logprobs 3", "logprobs", 3),
    ],
)
def test_each_sampling_option_sets_its_field(line: str, field: str, value: object) -> None:
    settings = sampling_of(build_parser().parse_args(["engine.onnx", "Hello", *line.split()]))
    assert getattr(settings, field) == value
    ignored: dict[str, Any] = {field: value}
    if "--temperature" in line:
        ignored["temperature"] = settings.temperature
    assert settings == Sampling(**ignored)


def test_the_statistics_have_the_seed_of_sampled_text_only(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tiny_engine), "Hello", "--max-new-tokens", "5", "--temperature", "1", "--seed", "7"])
    assert capsys.readouterr().err.endswith(" ms, seed 7\n")
    main([str(tiny_engine), "Hello", "--max-new-tokens", "5", "--seed", "7"])
    assert "seed" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--temperature -1", "temperature must be from 0 to 100, not -1.0"),
        ("--temperature nan", "temperature must be from 0 to 100, not nan"),
        ("--top-p 0.9", "top_p has no meaning with temperature 0 (greedy); set a temperature above 0"),
        ("--temperature 1 --top-k 0", "top_k must be at least 1, not 0"),
        ("--seed -1", "seed must be at least 0, not -1"),
        ("--ban -4", "a token in banned_tokens must be at least 0, not -4"),
        ("--logprobs 2", "--logprobs is for --json; add it, or leave --logprobs out"),
        ("--logit-bias 3=1 --logit-bias 3=2", "--logit-bias has 3=1.0 and 3=2.0; leave one of them out"),
        ("--force 0=4 --force 0=5", "--force has 0=4 and 0=5; leave one of them out"),
        ("--force 0=4 --ban 4", "token 4 is in banned_tokens, and forced_tokens has it as new token 0"),
    ],
)
def test_a_mistake_in_a_sampling_option_is_one_line_before_anything_is_loaded(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["no-such-engine.onnx", "Hello", *line.split()]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"ht-generate: error: {message}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--logit-bias 5", "argument --logit-bias: '5' is not a token and a number such as 42=-5.5"),
        ("--logit-bias x=1", "'x=1' is not a token and a number"),
        ("--force 0", "argument --force: '0' is not an index and a token such as 0=42"),
        ("--force 0=1.5", "'0=1.5' is not an index and a token"),
        ("--temperature hot", "argument --temperature: invalid float value: 'hot'"),
        ("--top-k 1.5", "argument --top-k: invalid int value: '1.5'"),
    ],
)
def test_a_sampling_option_that_cannot_be_read_shows_the_usage(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["engine.onnx", "Hello", *line.split()])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_help_has_the_sampling_options_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    _, group = capsys.readouterr().out.split("\nsampling:\n")
    for field in fields(Sampling):
        option = {"banned_tokens": "--ban", "forced_tokens": "--force"}.get(field.name, f"--{field.name}")
        # These are not for a command line.
        assert field.name in ("processors", "grammar") or option.replace("_", "-") in group


def test_more_threads_than_cores_are_warned_of_in_one_line(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.checks.cores", lambda: 2)
    assert main([str(tiny_engine), "Hello", "--max-new-tokens", "3", "--threads", "3"]) == 0
    first, _ = capsys.readouterr().err.split("\n", maxsplit=1)
    assert first == (
        "ht-generate: warning: threads is 3, and this process has 2 cores: its threads wait for each other; give at "
        "most 2"
    )


def test_a_prompt_on_stdin_without_an_end_is_refused(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.cli.MOST_STDIN", 100)
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 101))
    assert main([str(tiny_engine), "-"]) == 1
    assert "the prompt on stdin has more than 100 characters; shorten it" in capsys.readouterr().err


def test_a_closed_stdin_is_one_line(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main([str(tiny_engine), "-"]) == 1
    assert capsys.readouterr().err == (
        "ht-generate: error: stdin is closed; give the prompt as an argument, or on stdin\n"
    )


def test_json_has_escapes_for_what_stdout_lacks(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(tiny_engine), "Hello", "--json", "--max-new-tokens", "9"]
    main(arguments)
    expected = json.loads(capsys.readouterr().out)
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    assert main(arguments) == 0
    printed = json.loads(narrow.buffer.getvalue())
    assert (printed["text"], printed["tokens"]) == (expected["text"], expected["tokens"])
