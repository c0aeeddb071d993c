from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ht_export.bench.cli import main
from runtime import Generator
from runtime.bundle.engine_file import read_engine_file
from runtime.bundle.tuning_file import tuning_path
from runtime.drafting.sizing import AdaptiveSizes
from runtime.tree import TreeSizes
from runtime.tuning import menu_sizes

FEW = ["--repeats", "2", "--threads", "1", "--quiet"]


def tuned(engine: Path) -> dict[str, Any]:
    (entry,) = json.loads(tuning_path(engine).read_text())["tunings"]
    return entry


def named(entry: dict[str, Any]) -> list[TreeSizes]:
    return [TreeSizes(one["tree_rows"], tuple(one["pseudo_rows"])) for one in entry["sizes"]]


def mistake_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Return the one line for a user's mistake."""
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith("ht-bench: ")
    return line


@pytest.fixture(autouse=True)
def untuned(engine_copy: Path) -> None:
    tuning_path(engine_copy).unlink(missing_ok=True)


@pytest.fixture
def unmeasurable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be measured."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("runtime.tuning.measure", refuse)


def test_every_size_is_timed_and_later_loads_use_what_was_measured(
    engine_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["tune", str(engine_copy), *FEW, "--contexts", "40,8"]) == 0
    entry = tuned(engine_copy)
    expected = menu_sizes(read_engine_file(engine_copy).tree)
    assert (entry["kind"], entry["contexts"], named(entry)) == ("full", [8, 40], list(expected))
    assert all(len(one["milliseconds"]) == 2 and min(one["milliseconds"]) > 0 for one in entry["sizes"])
    printed = capsys.readouterr().out
    assert "| 1(0,0,0) |" in printed
    assert "ms at 40" in printed

    monkeypatch.setattr("runtime.tuning.measure", None)
    generator = Generator(engine_copy, threads=1)
    assert generator.tuning is not None
    assert (generator.tuning.kind, generator.tuning.menu.sizes) == ("full", expected)


def test_decoding_prompts_leaves_the_sizes_that_were_of_use(
    engine_copy: Path, prompts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", str(engine_copy), *FEW, "--contexts", "8"]
    assert main([*command, "--prompts", str(prompts_file), "--count", "3", "--max-new-tokens", "24"]) == 0
    entry = tuned(engine_copy)
    sizes = named(entry)
    assert sizes[0] == TreeSizes.plain(3)
    assert len(set(sizes)) == len(sizes)
    assert set(sizes) <= set(menu_sizes(read_engine_file(engine_copy).tree))
    about = entry["about"]
    assert about["prompts"] == 3
    # The first token of each answer comes with the prompt.
    assert sum(about["steps"].values()) <= 3 * 23
    assert 1 <= about["tokens_per_step"] <= 24
    assert entry["rate"] > 0
    assert entry["draft_value"] >= 0
    assert "3 prompts: " in capsys.readouterr().out
    generator = Generator(engine_copy, threads=1)
    assert len(generator.generate("Hello", max_new_tokens=12).tokens) == 12


def test_sizes_that_no_step_chose_are_left_out_but_plain_decoding_stays(
    engine_copy: Path, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = TreeSizes(2, (1, 1, 1))
    monkeypatch.setattr(AdaptiveSizes, "choose", lambda *arguments: kept)
    assert main(["tune", str(engine_copy), *FEW, "--contexts", "8", "--prompts", str(prompts_file)]) == 0
    assert named(tuned(engine_copy)) == [TreeSizes.plain(3), kept]


def test_default_contexts_are_within_what_the_engine_has_room_for(engine_copy: Path) -> None:
    about = read_engine_file(engine_copy)
    assert main(["tune", str(engine_copy), *FEW]) == 0
    contexts = tuned(engine_copy)["contexts"]
    assert contexts[0] == 64
    assert contexts[-1] < about.max_context


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--count", "0"], "--count must be at least 1, not 0"),
        (["--max-new-tokens", "-3"], "--max-new-tokens must be at least 1, not -3"),
        (["--repeats", "0"], "--repeats must be at least 1, not 0"),
        (["--repeats", "1000001"], "--repeats must be at most 1000000, not 1000001"),
        (["--threads", "0"], "threads must be at least 1, not 0"),
        (["--contexts", "8,99999"], "--contexts 99999: this engine has room for 0 to"),
        (["--contexts", "-1"], "--contexts -1: this engine has room for 0 to"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--device", "tpu"], "device must be cpu, cuda or a GPU's number such as cuda:1, not 'tpu'"),
    ],
)
@pytest.mark.usefixtures("unmeasurable")
def test_mistakes_are_told_before_anything_is_measured(
    engine_copy: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in mistake_of(capsys, ["tune", str(engine_copy), *FEW, *flags])
    assert not tuning_path(engine_copy).exists()


@pytest.mark.parametrize("flags", [["--contexts", "8;9"], ["--what"]])
def test_unknown_options(engine_copy: Path, flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", str(engine_copy), *flags])


@pytest.mark.usefixtures("unmeasurable")
def test_a_prompt_that_the_engine_has_no_room_for(
    engine_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "long.jsonl"
    prompts.write_text(json.dumps({"id": "long one", "prompt": "x" * 1000}) + "\n")
    line = mistake_of(capsys, ["tune", str(engine_copy), *FEW, "--prompts", str(prompts)])
    assert "prompt long one has " in line
    assert str(read_engine_file(engine_copy).max_context) in line


@pytest.mark.usefixtures("unmeasurable")
def test_an_engine_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = mistake_of(capsys, ["tune", str(tmp_path / "none" / "engine.onnx"), *FEW])
    assert "engine.onnx" in line
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.usefixtures("unmeasurable")
def test_a_folder_that_cannot_be_written_is_told_at_once(engine_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine_copy.parent.chmod(0o555)
    try:
        assert "cannot write" in mistake_of(capsys, ["tune", str(engine_copy), *FEW])
    finally:
        engine_copy.parent.chmod(0o755)


def test_interrupted_it_leaves_what_was_there(
    engine_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", str(engine_copy), *FEW, "--contexts", "8"]) == 0
    before = tuning_path(engine_copy).read_bytes()
    capsys.readouterr()

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.tuning.measure", interrupt)
    assert main(["tune", str(engine_copy), *FEW]) != 0
    assert "nothing was written" in capsys.readouterr().err
    assert tuning_path(engine_copy).read_bytes() == before
