"""`ht-serve` as a process: its options, its first lines, and its end."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

import httpx

from runtime import InputError
from runtime.serving.cli import _from_environment, build_parser, main, settings_of
from runtime.serving.exporting import engine_of
from runtime.serving.keys import read_keys
from runtime.serving.logs import configure
from tests.runtime.serving.live import CHAT, raw_request

ROOT = str(Path(__file__).parents[3])


class Process:
    def __init__(self, engine: Path, *options: str) -> None:
        command = [sys.executable, "-m", "runtime.serving.cli", str(engine), "--port", "0", "--no-adapt"]
        self.process = subprocess.Popen([*command, "--threads", "1", *options], stderr=subprocess.PIPE, text=True)
        self.lines: list[dict[str, Any]] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line))
            if self.lines[-1]["event"] == "ready":
                break
        listening = next(line for line in self.lines if line["event"] == "listening")
        self.name = listening["models"][0]
        self.url = f"http://127.0.0.1:{listening['port']}"
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line))

    def ended(self) -> int:
        status = self.process.wait(30)
        self._reader.join(10)
        return status


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """The program sets up loggers of its own: for the process, which goes on here."""
    loggers = [logging.getLogger(name) for name in ("runtime", "uvicorn", "asyncio")]
    before = [(one.handlers, one.level, one.propagate) for one in loggers]
    yield
    for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture
def start(tiny_engine: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def begin(*options: str) -> Process:
        made.append(Process(tiny_engine, *options))
        return made[-1]

    yield begin
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def test_sigterm_lets_streams_end_refuses_the_rest_and_exits_with_0(start: Callable[..., Process]) -> None:
    server = start("--drain-s", "30", "--served-model-name", "mine")
    assert server.name == "mine"
    body = {"model": "mine", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "speculate": False}
    client = httpx.Client(base_url=server.url, timeout=30)
    asked = {**body, "stream": True, "n": 8, "ignore_eos": True}
    with client.stream("POST", CHAT, json=asked) as found:
        parts = found.iter_lines()
        next(parts)
        server.process.send_signal(signal.SIGTERM)
        ready = 200
        while ready == 200:
            ready = client.get("/health/ready").status_code
        assert ready == 503
        refused = client.post(CHAT, json=body)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert client.get("/health/live").status_code == 200
        lines = [line for line in parts if line]
    assert lines[-1] == "data: [DONE]"
    assert sum('"finish_reason":"length"' in line for line in lines) == 8
    assert server.ended() == 0
    assert next(line for line in server.lines if line["event"] == "stopped")["drained"] is True


@pytest.mark.parametrize("signals", [1, 2])
def test_a_drain_has_an_end(start: Callable[..., Process], signals: int) -> None:
    server = start("--drain-s", "0.1" if signals == 1 else "60", "--max-batch", "1")
    body = {"model": server.name, "prompt": ["a"] * 100, "max_tokens": 200, "ignore_eos": True, "speculate": False}
    status: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: status.append(httpx.post(f"{server.url}/v1/completions", json=body)))
    asking.start()
    while "ht_num_requests_running{" not in (text := httpx.get(f"{server.url}/metrics").text) or (
        not any(line.startswith("ht_num_requests_running{") and line.endswith(" 1.0") for line in text.splitlines())
    ):
        time.sleep(0.01)
    half = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    if signals == 2:
        # Somebody who has not yet said all is cut off.
        half.sendall(raw_request(CHAT, body)[:-9])
    begun = time.monotonic()
    for _ in range(signals):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert server.ended() == 0
    assert time.monotonic() - begun < 20
    half.close()
    asking.join(10)
    # Nobody is left without an answer, or an end, and nothing is told as a fault.
    assert not status or status[0].json()["error"]["code"] == "shutting_down"
    assert not asking.is_alive()
    assert not [line for line in server.lines if line["level"] == "error" or "trace" in line]
    assert sum(line["event"] == "stopping at once" for line in server.lines) == signals - 1


def options_of(*given: str) -> Any:
    parser = build_parser()
    return parser.parse_args(["engine.onnx", *_from_environment(parser), *given])


def test_options_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HT_SERVE_MAX_BATCH", "3")
    monkeypatch.setenv("HT_SERVE_LOG_TEXTS", "1")
    monkeypatch.setenv("HT_SERVE_NO_ADAPT", "0")
    monkeypatch.setenv("HT_SERVE_SERVED_MODEL_NAME", "mine")
    found = options_of()
    assert (found.max_batch, found.log_texts, found.no_adapt) == (3, True, False)
    assert found.served_model_name == ["mine"]
    assert options_of("--max-batch", "4").max_batch == 4


def test_every_setting_has_its_option() -> None:
    found = settings_of(options_of("--max-tokens", "7", "--cors-origin", "https://a.example", "--escape", "all"))
    assert (found.max_tokens, found.cors_origins, found.escape) == (7, ("https://a.example",), "all")
    assert found.models == ()
    assert settings_of(build_parser().parse_args(["smollm2-135m"])).models == ("smollm2-135m",)


def test_loopback_is_the_default_and_strangers_without_keys_are_warned_of(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert options_of().host == "127.0.0.1"
    # Refused before anything is loaded: what is tried is the warning.
    assert main([str(tiny_engine.with_name("none.onnx")), "--host", "0.0.0.0"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("ht-serve: warning: anybody who reaches 0.0.0.0 can use this server")
    assert told[1].startswith("ht-serve: error: no engine at")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--port", "70000"], "--port must be 0 to 65535, not 70000"),
        (["--max-body", "5"], "max_body must be at least 1024, not 5"),
        (["--metrics-prefix", "1-"], "metrics_prefix must be letters"),
        (["--served-model-name", ""], "a model's name must be 1 to 256 characters"),
        (["--api-key-file", "/nowhere"], "/nowhere is not a valid file of API keys"),
        (["--precision", "int8"], "--precision is for models that are exported"),
    ],
)
def test_a_mistake_is_one_line(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert main([str(tiny_engine), *options]) == 1
    found = capsys.readouterr().err
    assert found.startswith("ht-serve: error: ")
    assert told in found
    assert found.count("\n") == 1


def test_an_address_that_is_taken_is_told_before_the_engine_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main([str(tmp_path / "engine.onnx"), "--port", port]) == 1
    assert capsys.readouterr().err == f"ht-serve: error: 127.0.0.1:{port}: Address already in use\n"


def test_keys_are_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("# ours\nsk-one\n\n  sk-two  \n")
    assert read_keys(path) == ["sk-one", "sk-two"]
    for content, told in (
        ("", "has no API key"),
        ("# none\n", "has no API key"),
        ("a b\n", "API key 1"),
        ("ok\nschlüssel\n", "API key 2"),
        ("x" * 2000, "API key 1"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=told) as caught:
            read_keys(path)
        assert "schl" not in str(caught.value)


def test_keys_in_the_environment_that_are_empty_open_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HT_API_KEYS", "one, two")
    assert settings_of(options_of()).api_keys == ("one", "two")
    monkeypatch.setenv("HT_API_KEYS", "")
    with pytest.raises(InputError, match="HT_API_KEYS has no API key"):
        settings_of(options_of())


def test_a_known_model_is_exported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def export(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[-1] == "--known-models":
            return subprocess.CompletedProcess(command, 0, "other\nsmollm2-135m\n")
        commands.append(command)
        Path(command[-1] if command[-2] == "--out" else command[-3]).with_suffix(".json").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("HT_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", export)
    for _ in range(2):
        assert engine_of("smollm2-135m") == tmp_path / "smollm2-135m" / "engine.onnx"
    assert engine_of("smollm2-135m", "int8") == tmp_path / "smollm2-135m-int8" / "engine.onnx"
    assert [command[3] for command in commands] == ["smollm2-135m"] * 2
    assert commands[1][-2:] == ["--precision", "int8"]
    for path in ("engine.onnx", "a/b", "./x", "model.plan"):
        assert engine_of(path) == Path(path)


def test_what_the_exporter_refuses_is_told_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A precision, as it refuses that before it takes its time to import torch."""
    monkeypatch.setenv("HT_CACHE", str(tmp_path))
    monkeypatch.setitem(os.environ, "PYTHONPATH", ROOT)
    with pytest.raises(InputError, match="smollm2-135m could not be exported; see above"):
        engine_of("smollm2-135m", "fp7")
    told = capfd.readouterr().err
    assert "exporting smollm2-135m to" in told
    assert "ht-export: error: argument --precision: invalid choice: 'fp7'" in told


def test_a_model_that_the_exporter_does_not_know_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(os.environ, "PYTHONPATH", ROOT)
    assert main(["no-such-model", "--port", "0"]) == 2
    found = capfd.readouterr()
    assert found.out == ""
    assert found.err.startswith("ht-serve: error: no-such-model is no engine file, and no model that ht-export knows (")
    assert "smollm2-135m" in found.err
    assert found.err.count("\n") == 1
    # Nothing was begun.
    assert not list(tmp_path.iterdir())


def test_without_the_exporter_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HT_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'hidden-transfer\[export\]'"):
        engine_of("smollm2-135m")


def test_what_asyncio_tells_is_in_the_same_log(capsys: pytest.CaptureFixture[str]) -> None:
    configure("debug")
    logging.getLogger("asyncio").warning("socket.send() raised exception.")
    logging.getLogger("asyncio").error("a task failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "a task failed"


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    for part in ("examples:", "curl", "HT_API_KEYS", "SIGTERM", "TLS"):
        assert part in told
