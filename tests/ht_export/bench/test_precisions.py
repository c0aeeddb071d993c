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


def test_random_weights_are_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(SHAPES, "llama-2-7b", {**SHAPES["llama-2-7b"], **small, "vocab_size": 300})
    folder = tmp_path / "random"
    assert main(["random-checkpoint", str(folder), "--shape", "llama-2-7b", "--layers", "2", "--dtype", "float16"]) == 0
    base = load_base_model(str(folder), None)
    assert (base.model.config.num_hidden_layers, str(base.model.dtype)) == (2, "torch.float16")
    assert base.tokenizer.decode(base.tokenizer("a b").input_ids) == "a b"
