"""Every example runs as its first lines say."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect

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
def test_plain_onnxruntime(name: str, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(name)
    plain = example("plain_onnxruntime")
    with Generator(engine, adapt=False) as generator:
        ids = list(generator.encode("Hello, tea."))
        expected = generator.generate(Tokens(ids), max_new_tokens=24).tokens
    for drafts in (True, False):
        tokens, passes = plain.generate(engine, ids, 24, drafts)
        assert tokens == expected
        assert passes <= len(tokens) if drafts else passes == len(tokens)
    command = [sys.executable, str(EXAMPLES / "plain_onnxruntime.py"), str(engine), "Hello"]
    assert " passes]" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


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


async def asked(
    app: Starlette, path: str, body: bytes, spec_version: str = "2.3", leave_after: int | None = None
) -> tuple[int, bytes, int]:
    """Post `body` as a server does, and leave after so many parts; return status, answer, and parts that were sent."""
    come, left = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()
    status, parts = 0, []

    async def receive() -> dict[str, Any]:
        if come:
            return come.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status
        if left.is_set() and spec_version == "2.4":
            raise OSError("the client has left")
        status = message.get("status", status)
        parts.append(message.get("body", b""))
        if leave_after is not None and len(parts) > leave_after:
            left.set()

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    with contextlib.suppress(ClientDisconnect):
        await app({**scope, "asgi": {"version": "3.0", "spec_version": spec_version}}, receive, send)
    return status, b"".join(parts), len(parts)


def test_service(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = example("service")
    app = service.make_app(str(tiny_engine))
    body = b'{"prompt": "Hello"}'
    monkeypatch.setattr(service, "MAX_NEW_TOKENS", 24)

    async def served() -> None:
        async with app.router.lifespan_context(app):
            whole, *streams = await asyncio.gather(
                asked(app, "/answer", body), asked(app, "/stream", body), asked(app, "/stream", body)
            )
            text = json.loads(whole[1])["text"].encode()
            assert [(status, told) for status, told, _ in streams] == [(200, text), (200, text)]
            # A prompt that cannot fit has its status, streamed or not, and so does a body that is none.
            for path in ("/answer", "/stream"):
                status, told, _ = await asked(app, path, json.dumps({"prompt": "x" * 300}).encode())
                assert (status, b"the prompt has" in told) == (400, True)
                assert (await asked(app, path, b"[]"))[0] == 400

    asyncio.run(served())


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_a_client_that_leaves_the_service_ends_its_request(tiny_engine: Path, spec_version: str) -> None:
    service = example("service")
    app = service.make_app(str(tiny_engine))

    async def served() -> None:
        async with app.router.lifespan_context(app):
            generator = app.state.generator
            before = generator.metrics()["cancelled"]
            # What is no longer referred to ends as well: here it is not left to that.
            gc.disable()
            try:
                await asked(app, "/stream", b'{"prompt": "Hello"}', spec_version, leave_after=2)
                for _ in range(500):
                    if not generator.metrics()["running"]:
                        break
                    await asyncio.sleep(0.01)
            finally:
                gc.enable()
            assert generator.metrics()["cancelled"] == before + 1

    asyncio.run(served())


def test_no_example_is_without_a_test() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'example("{path.stem}")' in tests, path.name
