"""Parsers of command lines: errors suggest the nearest there is, and shells can complete all that there is."""

from __future__ import annotations

import importlib.util

import pytest

from ht_export.bench.cli import build_parser as bench
from ht_export.cli import build_parser as export
from ht_export.doctor.cli import build_parser as doctor
from ht_export.parity.cli import build_parser as parity
from ht_export.training.cli import build_parser as train
from runtime.cli import build_parser as generate
from runtime.errors import InputError
from runtime.options import SHELLS, Parser
from runtime.serving.cli import build_parser as serve

ALL = {
    "ht-bench": bench,
    "ht-export": export,
    "ht-doctor": doctor,
    "ht-parity": parity,
    "ht-train": train,
    "ht-generate": generate,
    "ht-serve": serve,
}
without_shtab = pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="shtab is not installed")


@pytest.mark.parametrize(
    ("parser", "given", "told"),
    [
        (
            export(),
            ["smollm2-135m", "--out", "e.onnx", "--precison", "int8"],
            "--precison int8; did you mean --precision?",
        ),
        (export(), ["m", "--out", "e.onnx", "--tree_rows=4"], "--tree_rows=4; did you mean --tree-rows?"),
        (export(), ["m", "--out", "e.onnx", "--precision", "int16"], "; did you mean int8?"),
        (train(), ["evla"], "; did you mean eval?"),
        (train(), ["eval", "m", "--data", "d", "--transfer", "t", "--devise", "cpu"], "did you mean --device?"),
        (bench(), ["laod"], "; did you mean load?"),
        (bench("load"), ["load", "e", "--prompts", "p", "--clinets", "1"], "did you mean --clients?"),
        (generate(), ["engine.onnx", "Hi", "--temprature", "1"], "did you mean --temperature?"),
        (serve(), ["engine.onnx", "--prot", "1"], "did you mean --port?"),
    ],
)
def test_a_mistyped_option_is_answered_with_the_nearest(
    parser: Parser, given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(given)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_nothing_is_suggested_that_is_far_from_what_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        doctor().parse_args(["--qqqqqq"])
    assert "did you mean" not in capsys.readouterr().err


def test_an_unknown_option_of_a_subcommand_is_one_line_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench("tune").parse_args(["tune", "engine.onnx", "--no-such"])
    told = capsys.readouterr().err
    assert told == "ht-bench tune: error: unrecognized arguments: --no-such (options: ht-bench tune --help)\n"


@without_shtab
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ALL)
def test_shells_complete_every_command(name: str, shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ALL[name]().parse_args(["--print-completion", shell])
    assert caught.value.code == 0
    script = capsys.readouterr().out
    assert name in script
    option = {"ht-bench": "--max-new-tokens", "ht-export": "--precision", "ht-train": "--data", "ht-serve": "--port"}
    assert option.get(name, "--json").lstrip("-") in script


@pytest.mark.skipif(importlib.util.find_spec("shtab") is not None, reason="shtab is installed")
def test_completion_without_shtab_says_what_installs_it() -> None:
    with pytest.raises(InputError, match=r"pip install 'hidden-transfer\[completion\]'"):
        generate().parse_args(["--print-completion", "bash"])
