"""`ht-bench peers --url`: a server by its address, beside our engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

from ht_export.bench import cli
from runtime import Generator
from tests.runtime.serving.live import Live


def peers(*arguments: object) -> int:
    return cli.main(["peers", *map(str, arguments)])


def test_a_servers_texts_are_held_against_the_models_own(
    tiny_engine: Path, tiny_checkpoint: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "peers.json"
    options = ["--prompts", prompts_file, "--work", tmp_path / "work", "--json", out, "--count", 3, "--threads", 1]
    options += ["--peers", "ours", "--precisions", "16bit", "--max-new-tokens", 12, "--rounds", 1, "--clients", "1,2"]
    with Generator(tiny_engine, threads=1) as generator:
        live = Live(generator)
        try:
            options += ["--url", f"served={live.url}/v1", "--url", "nobody=http://127.0.0.1:9/v1"]
            assert peers(tiny_checkpoint, *options) == 0
        finally:
            live.close()
    found = json.loads(out.read_text())
    assert [(row["entry"], row["clients"]) for row in found["rows"]] == [("served", 1), ("served", 2)]
    for row in found["rows"]:
        assert [answer["differs_at"] for answer in row["answers"]] == [None] * 3
        assert all(0 < answer["tokens"] <= 12 for answer in row["answers"])
    [failed] = {line.partition(": ")[2] for line in found["failed"]}
    assert "does not answer as OpenAI's API does" in failed
    assert "served" in capsys.readouterr().out
