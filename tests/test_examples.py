"""Every example runs as its first lines say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from runtime import Generator, Tokens
from tests.modules import ROOT, module_at

EXAMPLES = ROOT / "examples"


def example(name: str) -> ModuleType:
    return module_at(f"examples/{name}.py")


def test_embed(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("embed").main([str(tiny_engine), "Hello", "x" * 300, "there"])
    out = capsys.readouterr().out
    assert out.count(" per step, first after ") == 2
    assert "skipped: the prompt has" in out


def test_stream(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("stream").main([str(tiny_engine)])
    assert "; steps by drafted tokens accepted: (" in capsys.readouterr().out


def test_sample_with_a_processor(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("sample_with_a_processor").main([str(tiny_engine), "Hello"])
    out = capsys.readouterr().out
    assert out.endswith("the same tokens both ways\n")
    # Once for each token, however many a step made certain.
    calls = [int(line.split("called ")[1].split()[0]) for line in out.splitlines() if "called" in line]
    assert calls[0] == calls[1]


def test_compare(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("compare").main([str(tiny_engine), "Hello"])
    out = capsys.readouterr().out
    rows = {words[0]: words[1:] for line in out.splitlines() if len(words := line.split()) == 5}
    seconds, tokens, passes, per_step = rows["plain"]
    assert float(seconds) > 0
    assert (tokens, per_step) == (rows["speculative"][1], "1.00")
    assert int(passes) >= int(rows["speculative"][2])
    assert out.splitlines()[-1].endswith(", the same text")


@pytest.mark.parametrize("name", ["tiny_engine", "draft_head_engine"])
def test_plain_onnxruntime(name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    engine = request.getfixturevalue(name)
    plain = example("plain_onnxruntime")
    with Generator(engine, adapt=False) as generator:
        ids = list(generator.encode("Hello, tea."))
        expected = generator.generate(Tokens(ids), max_new_tokens=24).tokens
    for drafts in (True, False):
        tokens, passes = plain.generate(plain.Engine(engine), ids, 24, drafts)
        assert tokens == expected
        assert passes <= len(tokens) if drafts else passes == len(tokens)
    plain.main([str(engine), "Hello"])
    assert " passes]" in capsys.readouterr().out


def test_node(tiny_engine: Path) -> None:
    folder = EXAMPLES / "node"
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (folder / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip("onnxruntime-node is not installed; run npm install --ignore-scripts in examples/node")
    with Generator(tiny_engine, adapt=False) as generator:
        ids = list(generator.encode("Hello, tea."))
        expected = generator.generate(Tokens(ids), max_new_tokens=24).tokens
    command = ["node", str(folder / "generate.mjs"), str(tiny_engine), "24", *map(str, ids)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == expected


def test_train_in_small(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example("train_in_small").main([str(tiny_checkpoint), str(tmp_path / "work")]) == 0
    assert "tokens per step" in capsys.readouterr().err
    assert (tmp_path / "work" / "engine.onnx").is_file()


def test_no_example_is_without_a_test() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'example("{path.stem}")' in tests, path.name
