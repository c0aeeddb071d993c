"""Engines of one model compared across precisions, and random weights in the shape of a real one."""

import json
from pathlib import Path

import pytest

from ht_export.bench.cli import main
from ht_export.bench.random_checkpoint import SHAPES
from ht_export.model.checkpoint import load_base_model


def test_an_engine_agrees_with_itself(tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me about {n} of them."}) + "\n" for n in range(3)))
    engines = [str(tiny_engine), str(tiny_engine)]
    short = ["--count", "2", "--max-new-tokens", "6", "--windows", "2", "--repeats", "1"]
    assert main(["precisions", "--prompts", str(prompts), *short, "--json", str(out), *engines]) == 0
    report = json.loads(out.read_text())
    assert report["command"].startswith("ht-bench precisions --prompts prompts.jsonl --count 2")
    first, second = report["engines"]
    assert (second["same_choice"], second["before_parting"]) == (1.0, 1.0)
    assert first["perplexity"] == second["perplexity"] > 1
    assert first["precision"] == "float32"
    assert capsys.readouterr().out.count("| float32 |") == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--count 0", "--count must be at least 1, not 0"),
        ("--max-new-tokens 0", "--max-new-tokens must be at least 1, not 0"),
        ("--windows 0", "--windows must be at least 1, not 0"),
        ("--repeats 0", "--repeats must be at least 1, not 0"),
        ("--repeats 1000001", "--repeats must be at most 1000000, not 1000001"),
        ("--json FOLDER", "is a folder; give the name of a file"),
        ("--json ENGINE", "engine.onnx is read here, and what is written would replace it; choose another name"),
        ("--json BESIDE", "engine.json is read here, and what is written would replace it; choose another name"),
        ("--json FOLDER/prompts.jsonl", "prompts.jsonl is read here, and what is written would replace it"),
        ("--repeats 1", "the prompts together have 15 tokens, and perplexity takes more than 32; give more"),
    ],
)
def test_a_mistake_is_one_line(
    tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "A short prompt."}\n')
    command = ["precisions", str(tiny_engine), "--prompts", str(prompts), "--max-new-tokens", "3"]
    for name, path in (("FOLDER", tmp_path), ("ENGINE", tiny_engine), ("BESIDE", tiny_engine.with_suffix(".json"))):
        more = more.replace(name, str(path))
    assert main([*command, *more.split()]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("layers", [-1, 0, 33, 10**18])
def test_random_weights_have_no_more_layers_than_their_shape(
    layers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "random"
    assert main(["random-checkpoint", str(folder), "--shape", "llama-2-7b", "--layers", str(layers)]) == 1
    assert f"--layers must be at {'least 1' if layers < 1 else 'most 32'}, not {layers}" in capsys.readouterr().err
    assert not folder.exists()


def test_a_head_size_without_a_kernel_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel-resources", "--head-dim", "7"]) == 1
    assert "--head-dim: the tree-attention kernel takes head sizes from 16 to 256" in capsys.readouterr().err


def test_random_weights_are_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(SHAPES, "llama-2-7b", {**SHAPES["llama-2-7b"], **small, "vocab_size": 300})
    folder = tmp_path / "random"
    assert main(["random-checkpoint", str(folder), "--shape", "llama-2-7b", "--layers", "2", "--dtype", "float16"]) == 0
    base = load_base_model(str(folder), None)
    assert (base.model.config.num_hidden_layers, str(base.model.dtype)) == (2, "torch.float16")
    assert base.tokenizer.decode(base.tokenizer("a b").input_ids) == "a b"
