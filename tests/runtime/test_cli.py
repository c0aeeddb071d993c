import io
import json
from pathlib import Path

import pytest

from runtime import Generator
from runtime.cli import main
from runtime.command_line import run


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
