"""`ht-bench load --url`: a server under load, ours and one that does wrong."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ht_export.bench import cli
from tests.runtime.serving.live import Live
from tests.runtime.waiting import idle, until


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    texts = ["Hello", "The sky is blue", "Why?", "xyz" * 9]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def load(*arguments: object) -> int:
    return cli.main(["load", *map(str, arguments), "--quiet"])


@pytest.mark.parametrize(
    "when",
    [
        ["--clients", "1,4", "--requests", "12"],
        ["--clients", "4", "--seconds", "0.5", "--leave", "0.5"],
        ["--rate", "100", "--requests", "12"],
        ["--clients", "2", "--requests", "6", "--temperature", "0.8", "--seed", "3", "--extra", '{"speculate": false}'],
    ],
)
def test_a_server_of_ours_does_nothing_wrong(
    live: Live, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], when: list[str]
) -> None:
    out = tmp_path / "load.json"
    options = ["--prompts", prompts, "--max-new-tokens", 30, "--json", out]
    assert load("--url", f"{live.url}/v1", *options, *when) == 0, capsys.readouterr()
    found = json.loads(out.read_text())
    assert (found["format"], found["version"]) == ("ht-bench-load-url", 1)
    for level in found["levels"]:
        assert level["error"] == level["refused"] == 0
        assert level["other_texts"] == []
        assert level["whole"] + level["left"] == level["requests"] > 0
        assert (level["left"] > 0) == ("--leave" in when)
        assert level["tokens_per_second"] > 0
        assert 0 < level["first_piece_s"]["median"] <= level["request_s"]["p99"]
    assert "| arrivals |" in capsys.readouterr().out
    until(lambda: idle(live.generator))


def test_what_a_full_server_refuses_is_counted_and_no_error(serve: Any, prompts: Path, tmp_path: Path) -> None:
    live = serve({"max_queue": 1, "max_batch": 1})
    out = tmp_path / "load.json"
    options = ["--prompts", prompts, "--max-new-tokens", 60, "--json", out, "--clients", 8, "--seconds", 1.5]
    assert load("--url", f"{live.url}/v1", *options) == 0
    (level,) = json.loads(out.read_text())["levels"]
    assert level["refused"] > 0
    assert level["error"] == 0


def wrong(kind: str) -> Starlette:
    """A server that answers the first request for each of four prompts, and all later ones wrongly."""
    count = 0

    async def chat(request: Request) -> Response:
        nonlocal count
        count += 1
        if count > 4 and kind == "status":
            return JSONResponse({"error": {"message": "broken"}}, 500)

        async def events() -> AsyncIterator[str]:
            text = "other" if count > 4 and kind == "text" else "text"
            yield f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"
            if count > 4 and kind == "told":
                yield f"data: {json.dumps({'error': {'message': 'broken'}})}\n\n"
            if not (count > 4 and kind == "end"):
                yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])


@pytest.mark.parametrize(
    ("kind", "told"),
    [("status", "500: "), ("text", "| 8 |"), ("told", "broken"), ("end", "the stream ended without [DONE]")],
)
def test_a_server_that_does_wrong_is_found_out(
    live: Live, prompts: Path, capsys: pytest.CaptureFixture[str], kind: str, told: str
) -> None:
    other = Live(live.generator, app=wrong(kind))
    options = ["--prompts", prompts, "--clients", 2, "--requests", 8, "--model", "any"]
    assert load("--url", f"{other.url}/v1", *options) == 1
    found = capsys.readouterr()
    assert told in found.out
    assert "8 answers failed, or were other than alone" in found.err
    other.close()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "give an engine, or --url"),
        (["engine.onnx", "--url", "http://127.0.0.1:9/v1"], "give an engine, or --url"),
        (["--url", "http://127.0.0.1:9/v1"], "does not answer as OpenAI's API does"),
        (["--url", "no address"], "does not answer as OpenAI's API does"),
        (["--url", "http://127.0.0.1:9/v1", "--threads", "2"], "--threads is for an engine"),
        (["--url", "http://127.0.0.1:9/v1", "--extra", "[]"], "--extra must be an object"),
        (["--url", "http://127.0.0.1:9/v1", "--leave", "2"], "--leave must be from 0 to 1"),
        (["engine.onnx", "--seconds", "2"], "--seconds is for a server"),
    ],
)
def test_a_mistake_is_one_line(
    prompts: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert load(*options, "--prompts", prompts) == 1
    found = capsys.readouterr().err
    assert told in found
    assert found.count("\n") == 1
