"""Running a server: health, metrics, keys, limits, clients that leave or are slow, and an engine that fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

from starlette.applications import Starlette
from starlette.routing import Mount

from runtime import Generator, Sampling
from runtime.serving import Settings, create_app
from runtime.serving.logs import JsonLines
from tests.runtime.serving.live import CHAT, RESPONSES, TEXT, Live, held_up, raw_request
from tests.runtime.waiting import idle, until

Serve = Callable[..., Live]
HELLO = [{"role": "user", "content": "Hello"}]


def chat(live: Live, **more: Any) -> dict[str, Any]:
    return {"model": live.name, "messages": HELLO, "max_tokens": 8, "temperature": 0, **more}


def test_models_are_listed_under_the_names_that_were_given(serve: Serve, generator: Generator) -> None:
    live = serve(models=("small", "org/small"))
    found = live.client.get("/v1/models").json()
    assert [one["id"] for one in found["data"]] == ["small", "org/small"]
    one = live.client.get("/v1/models/org/small").json()
    assert one == found["data"][1]
    assert one["max_model_len"] == generator.about.max_context
    answer = live.client.post(CHAT, json={**chat(live), "model": "org/small"}).json()
    assert answer["model"] == "org/small"


# Health.


def test_a_server_is_ready_when_it_is_warm(live: Live) -> None:
    until(lambda: live.client.get("/health/ready").status_code == 200)
    assert live.client.get("/health/live").json() == {"status": "ok"}
    assert live.client.get("/health").status_code == 200


def test_until_then_it_lives_and_is_not_ready(tiny_engine: Any) -> None:
    with Generator(tiny_engine, threads=1, adapt=False) as generator:
        with held_up(generator):
            server = Live(generator)
            assert server.client.get("/health/live").status_code == 200
            found = server.client.get("/health/ready")
            assert (found.status_code, found.json()) == (503, {"status": "the server is warming up"})
        until(lambda: server.client.get("/health/ready").status_code == 200)
        server.close()


def test_an_engine_that_fails_is_told_to_all_and_nobody_hangs(serve: Serve) -> None:
    live = serve({})
    engine = live.generator.engine
    client = live.client
    with ThreadPoolExecutor(3) as pool, held_up(live.generator):

        def fail(batch: object) -> None:
            raise RuntimeError("out of memory")

        asked = [
            pool.submit(client.post, path, json={"model": live.name, **body})
            for path, body in (
                (CHAT, {"messages": HELLO}),
                (CHAT, {"messages": HELLO, "stream": True}),
                (TEXT, {"prompt": "a"}),
            )
        ]
        until(lambda: live.generator.metrics()["waiting"] == 3)
        engine.run = fail  # type: ignore[assignment, method-assign]
    for one in asked:
        found = one.result(20)
        assert found.status_code == 503
        assert found.json()["error"]["code"] == "engine_failed"
        assert "out of memory" in found.json()["error"]["message"]
    for path in ("/health/ready", "/health/live"):
        assert client.get(path).status_code == 503
    assert client.post(CHAT, json=chat(live)).status_code == 503
    assert re.search(r"^ht_engine_failed\{.*\} 1.0$", client.get("/metrics").text, re.M)
    # What says nothing of the engine goes on.
    assert client.get("/v1/models").status_code == 200


def test_an_engine_that_fails_in_the_middle_of_a_stream_ends_it_with_an_error(serve: Serve) -> None:
    live = serve({})
    for path, body in ((CHAT, {"messages": HELLO}), (RESPONSES, {"input": "Hello"})):
        if live.generator.failure is not None:
            live = serve({})
        run = live.generator.engine.run
        passes = 0

        def fail(batch: Any, run: Any = run) -> Any:
            nonlocal passes
            passes += 1
            if passes > 3:
                raise RuntimeError("out of memory")
            return run(batch)

        live.generator.engine.run = fail  # type: ignore[method-assign]
        asked = {"model": live.name, "stream": True, "temperature": 0, "speculate": False, **body}
        found = live.client.post(path, json=asked)
        assert found.status_code == 200
        events = [line.removeprefix("data: ") for line in found.text.splitlines() if line.startswith("data: ")]
        if path == CHAT:
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["error"]["code"] == "engine_failed"
        else:
            last = json.loads(events[-1])
            assert last["type"] == "response.failed"
            assert "out of memory" in last["response"]["error"]["message"]


# Keys and origins.


def test_a_key_is_asked_for_where_there_are_keys(serve: Serve) -> None:
    live = serve(api_keys=("secret-1", "secret-2"))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret-1"}, {"authorization": "Bearer"}):
        found = live.client.get("/v1/models", headers=headers)
        assert found.status_code == 401
        assert found.json()["error"]["code"] == "invalid_api_key"
        assert found.headers["www-authenticate"] == "Bearer"
        assert live.client.post(CHAT, json={}, headers=headers).status_code == 401
    for key in ("secret-1", "secret-2"):
        headers = {"authorization": f"Bearer {key}"}
        assert live.client.get("/v1/models", headers=headers).status_code == 200
        assert live.client.post(CHAT, json=chat(live), headers=headers).status_code == 200
    for path in ("/health/live", "/health/ready", "/metrics", "/openapi.json"):
        assert live.client.get(path).status_code == 200
    assert "secret" not in repr(live.settings)


@pytest.mark.parametrize("root", ["", "/", "/v", "/v1", "/v1/", "/v1/models", "/a", "/a/"])
@pytest.mark.parametrize("path", ["{root}/v1/models", "/v1/models", "//v1/models"])
def test_nothing_is_told_without_a_key_wherever_the_application_is_mounted(
    generator: Generator, root: str, path: str
) -> None:
    """Servers differ in whether a path begins with that of the mount."""
    app = create_app(generator, Settings(api_keys=("k",), warm_up=False))
    sent: list[Any] = []

    async def ask() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": path.format(root=root), "root_path": root, "headers": []}
        await app({**scope, "query_string": b""}, lambda: asyncio.sleep(0), send)  # type: ignore[arg-type, return-value]

    asyncio.run(ask())
    assert sent[0]["status"] in (401, 404)


def test_other_web_pages_are_let_in_only_by_name(serve: Serve, live: Live) -> None:
    asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in live.client.options(CHAT, headers=asked).headers
    other = serve(cors_origins=("https://example.org",))
    assert other.client.options(CHAT, headers=asked).headers["access-control-allow-origin"] == "https://example.org"
    elsewhere = {**asked, "origin": "https://evil.example"}
    assert "access-control-allow-origin" not in other.client.options(CHAT, headers=elsewhere).headers
    refused = other.client.post(CHAT, json={}, headers={"origin": "https://example.org"})
    assert refused.status_code == 400
    assert refused.headers["access-control-allow-origin"] == "https://example.org"


# Limits.


def test_a_body_that_is_too_large_is_not_read(serve: Serve) -> None:
    live = serve(max_body=2000)
    assert live.client.post(CHAT, json=chat(live)).status_code == 200
    told = live.client.post(CHAT, content=b"x" * 2001, headers={"content-type": "application/json"})
    assert (told.status_code, told.json()["error"]["code"]) == (413, "request_too_large")

    def parts() -> Any:
        for _ in range(100):
            yield b"x" * 100

    untold = live.client.post(CHAT, content=parts(), headers={"content-type": "application/json"})
    assert untold.status_code == 413


def test_whoever_sends_too_large_a_body_to_its_end_hears_of_it(live: Live) -> None:
    size = live.settings.max_body + (4 << 20)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {size}\r\n\r\n"
    with live.connect() as connection:
        connection.settimeout(10)
        connection.sendall(head.encode() + b"x" * size)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_more_tokens_than_are_allowed(serve: Serve) -> None:
    live = serve(max_tokens=10)
    found = live.client.post(CHAT, json=chat(live, max_tokens=11))
    assert (found.status_code, found.json()["error"]["param"]) == (400, "max_tokens")
    answer = live.client.post(CHAT, json=chat(live, max_tokens=None, ignore_eos=True)).json()
    assert answer["usage"]["completion_tokens"] == 10


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(serve: Serve) -> None:
    live = serve({"max_queue": 2})
    with ThreadPoolExecutor(2) as pool:
        with held_up(live.generator):
            waiting = [pool.submit(live.client.post, CHAT, json=chat(live)) for _ in range(2)]
            until(lambda: live.generator.metrics()["waiting"] == 2)
            begun = time.monotonic()
            for stream in (False, True):
                found = live.client.post(CHAT, json=chat(live, stream=stream))
                assert found.status_code == 429
                assert found.json()["error"]["code"] == "queue_full"
                assert 1 <= int(found.headers["retry-after"]) <= 60
            assert time.monotonic() - begun < 5
        assert [one.result().status_code for one in waiting] == [200, 200]


def test_a_request_for_many_answers_has_all_of_them_or_none(serve: Serve) -> None:
    live = serve({"max_queue": 2})
    with held_up(live.generator):
        found = live.client.post(CHAT, json=chat(live, n=3, temperature=1))
        assert found.status_code == 429
    until(lambda: idle(live.generator))
    assert live.generator.metrics()["finished_requests"] == 1
    assert len(live.client.post(CHAT, json=chat(live, n=2, temperature=1)).json()["choices"]) == 2


def test_streams_are_counted(serve: Serve) -> None:
    live = serve(max_streams=2)
    found = live.client.post(CHAT, json=chat(live, stream=True, n=3, temperature=1))
    assert (found.status_code, found.json()["error"]["code"]) == (429, "queue_full")
    for _ in range(3):
        assert live.client.post(CHAT, json=chat(live, stream=True, n=2, temperature=1)).status_code == 200


# Clients.


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_slots_within_a_step(
    live: Live, generator: Generator, streamed: bool, n: int
) -> None:
    until(lambda: idle(generator))
    before = generator.metrics()
    passes = before["decode_passes"]
    body = chat(live, stream=streamed, n=n, max_tokens=230, ignore_eos=True, speculate=False)
    connection = live.connect()
    connection.sendall(raw_request(CHAT, body))
    if streamed:
        assert b"200" in connection.recv(1000)
    else:
        until(lambda: generator.metrics()["running"] == n)
    connection.close()
    until(lambda: idle(generator), 5)
    after = generator.metrics()
    assert after["cancelled"] - before["cancelled"] == n
    assert after["decode_passes"] - passes < 220


def test_a_client_that_leaves_while_it_waits_leaves_the_queue(live: Live, generator: Generator) -> None:
    with held_up(generator):
        connection = live.connect()
        connection.sendall(raw_request(CHAT, chat(live, stream=True)))
        until(lambda: generator.metrics()["waiting"] == 1)
        connection.close()
        until(lambda: live.client.get("/metrics").text.count("ht_http_requests_open") and _open(live) == 1)
    until(lambda: idle(generator))


def _open(live: Live) -> float:
    found = re.search(r"^ht_http_requests_open\{.*\} (\S+)$", live.client.get("/metrics").text, re.M)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize(
    "cut",
    [b"", b"POST", b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n", None],
    ids=["nothing", "a", "head", "body"],
)
def test_a_client_that_sends_too_slowly_is_cut_off(serve: Serve, cut: bytes | None) -> None:
    live = serve(body_s=0.3)
    whole = raw_request(CHAT, chat(live))
    connection = live.connect()
    connection.settimeout(10)
    connection.sendall(whole[:-10] if cut is None else cut)
    found = b""
    with connection:
        try:
            while part := connection.recv(1000):
                found += part
        except ConnectionError:
            pass
    if cut is None:
        assert found.startswith(b"HTTP/1.1 408")
    assert live.client.post(CHAT, json=chat(live)).status_code == 200


def test_a_second_request_on_a_connection_may_be_slow_no_more_than_the_first(serve: Serve) -> None:
    live = serve(body_s=0.3)
    connection = live.connect()
    connection.settimeout(10)
    connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
    found = b""
    while not found.endswith(b'"ok"}'):
        found += connection.recv(1000)
    connection.sendall(b"GET /health")
    begun = time.monotonic()
    with contextlib.suppress(ConnectionError):
        assert connection.recv(1000) == b""
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("line", ["GET /health/live", "POST /nothing", f"POST {CHAT}"])
def test_a_client_that_goes_on_sending_what_nobody_waits_for_is_cut_off(serve: Serve, line: str) -> None:
    live = serve(body_s=0.3)
    with live.connect() as connection:
        connection.sendall(f"{line} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1")
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begun < 5:
                connection.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - begun < 5


def test_a_client_that_does_not_read_is_cut_off(serve: Serve, generator: Generator) -> None:
    live = serve(reader_s=0.3)
    connection = live.connect_with_small_buffers()
    # Far more bytes than all buffers between hold.
    body = {
        "model": live.name,
        "prompt": ["a"] * 60,
        "max_tokens": 200,
        "logprobs": 20,
        "stream": True,
        "ignore_eos": True,
    }
    connection.sendall(raw_request(TEXT, body))
    until(lambda: generator.metrics()["running"] > 0)
    until(lambda: idle(generator) and _open(live) == 1)
    connection.close()


def test_clients_that_come_and_go_at_every_stage_leave_nothing(live: Live, generator: Generator) -> None:
    whole = raw_request(CHAT, chat(live, stream=True, max_tokens=100))
    for cut in (1, 20, 80, len(whole) // 2, len(whole) - 1, len(whole)):
        with live.connect() as connection:
            connection.sendall(whole[:cut])
            time.sleep(0.01)
    until(lambda: idle(generator) and _open(live) == 1)
    assert live.chat(temperature=0, max_tokens=5)["choices"]


# What is told of requests.


def test_each_answer_has_the_id_of_its_request(live: Live) -> None:
    assert live.client.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for odd in ("a b", "x" * 200, "<script>"):
        found = live.client.get("/v1/models", headers={"x-request-id": odd}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", found)
    assert live.client.post(CHAT, json={}, headers={"x-request-id": "mine-2"}).headers["x-request-id"] == "mine-2"


def told_of(caplog: pytest.LogCaptureFixture, path: str) -> list[dict[str, Any]]:
    """Return what was logged of the requests of `path`."""
    fields: list[dict[str, Any]] = [vars(record).get("fields", {}) for record in list(caplog.records)]
    return [entry for entry in fields if entry.get("path") == path and "status" in entry]


@pytest.mark.parametrize("told", [False, True])
def test_logs_are_json_without_what_was_said(serve: Serve, caplog: pytest.LogCaptureFixture, told: bool) -> None:
    live = serve(log_texts=told)
    caplog.set_level(logging.INFO, "runtime.serving")
    secret = "my secret question"
    answer = live.chat(secret, temperature=0, max_tokens=8)
    live.client.post(CHAT, json={"model": live.name, "messages": [{"role": secret}]})
    until(lambda: {200, 400} <= {entry["status"] for entry in told_of(caplog, CHAT)})
    lines = [JsonLines().format(record) for record in caplog.records if record.name == "runtime.serving"]
    entries = [json.loads(line) for line in lines]
    (one,) = [entry for entry in entries if entry.get("path") == CHAT and entry["status"] == 200]
    assert one["event"] == "request"
    assert one["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert one["completion_tokens"] == 8
    assert one["finish"] == ["length"]
    assert one["request_id"]
    (other,) = [entry for entry in entries if entry["status"] == 400]
    assert other["error"] == "invalid_value"
    assert any(secret in line for line in lines) == told


def metric(live: Live, name: str, **labels: str) -> float:
    for line in live.client.get("/metrics").text.splitlines():
        found = re.fullmatch(r"([a-zA-Z0-9_:]+)\{(.*)\} (\S+)", line)
        if found and found[1] == name:
            own = dict(re.findall(r'(\w+)="([^"]*)"', found[2]))
            if all(own.get(key) == value for key, value in labels.items()):
                return float(found[3])
    raise AssertionError(f"no {name} with {labels}")


@pytest.mark.parametrize("prefix", ["ht_", "vllm:"])
def test_metrics_are_what_the_generator_counts(serve: Serve, generator: Generator, prefix: str) -> None:
    live = serve(metrics_prefix=prefix)
    live.chat("Stop here", temperature=0, max_tokens=33)
    found = generator.metrics()
    assert metric(live, f"{prefix}num_requests_running") == metric(live, f"{prefix}num_requests_waiting") == 0
    assert metric(live, f"{prefix}generation_tokens_total") == found["chosen_tokens"] > 0
    assert metric(live, f"{prefix}prompt_tokens_total") == found["prompt_tokens"]
    assert metric(live, f"{prefix}prefix_cache_hits_total") == found["cached_prompt_tokens"]
    assert metric(live, f"{prefix}spec_decode_num_draft_tokens_total") == found["candidates"]
    accepted = metric(live, f"{prefix}spec_decode_num_accepted_tokens_total")
    assert accepted == sum(found["accepted_at"]) > 0
    first = metric(live, f"{prefix}spec_decode_num_accepted_tokens_per_pos_total", position="0")
    assert first == found["accepted_at"][0]
    for name, field in (
        ("time_to_first_token_seconds", "first_token_seconds"),
        ("inter_token_latency_seconds", "token_seconds"),
        ("e2e_request_latency_seconds", "request_seconds"),
        ("request_queue_time_seconds", "queue_seconds"),
    ):
        assert metric(live, f"{prefix}{name}_count") == found[field]["count"] > 0
        assert metric(live, f"{prefix}{name}_bucket", le="+Inf") == found[field]["count"]
        assert metric(live, f"{prefix}{name}_sum") == pytest.approx(found[field]["sum"])
    assert metric(live, f"{prefix}request_success_total", finished_reason="length") == 1
    assert metric(live, f"{prefix}http_requests_total", path=CHAT, status="200") == 1


def test_what_clients_write_into_paths_makes_no_metrics(live: Live) -> None:
    live.client.get("/v1/odd-path-1")
    live.client.get("/v1/models/odd-model")
    assert "odd" not in live.client.get("/metrics").text


# Beside others.


def test_an_application_can_be_mounted_in_another(generator: Generator) -> None:
    outer: Any = Starlette(routes=[Mount("/llm", app=create_app(generator, Settings(api_keys=("k",))))])
    live = Live(generator, app=outer)
    key = {"authorization": "Bearer k"}
    assert live.client.get("/llm/v1/models").status_code == 401
    name = live.client.get("/llm/v1/models", headers=key).json()["data"][0]["id"]
    body = {"model": name, "messages": HELLO, "max_tokens": 4, "temperature": 0}
    found = live.client.post(f"/llm{CHAT}", json=body, headers=key)
    expected = generator.generate("Hello", max_new_tokens=4).text
    assert found.json()["choices"][0]["message"]["content"] == expected
    until(lambda: live.client.get("/llm/health/ready").status_code == 200)
    live.close()


def test_many_clients_at_once_have_the_texts_that_they_have_alone(live: Live, generator: Generator) -> None:
    prompts = [f"Question {number}" for number in range(24)]
    samplings = [Sampling(temperature=0.8, seed=number) if number % 2 else Sampling() for number in range(24)]
    expected = [
        generator.generate(prompt, max_new_tokens=20, sampling=sampling, speculate=False).text
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]

    def ask(number: int) -> str:
        sampling = samplings[number]
        asked = {
            "messages": [{"role": "user", "content": prompts[number]}],
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "max_tokens": 20,
        }
        if number % 3:
            events = live.events(CHAT, **asked)
            return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
        return str(live.ask(CHAT, **asked)["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(24))) == expected
