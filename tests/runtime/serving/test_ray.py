"""Replicas by Ray Serve: routing by prefix, and a replica that is lost under load."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx", "ray"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

import httpx
import ray
from ray import serve

from runtime import Generator, InputError
from runtime.serving.ray import Options, build, key_of, options_of, ranked
from tests.runtime.serving.live import CHAT
from tests.runtime.waiting import until

ROOT = str(Path(__file__).parents[3])
PORT = 8319
MODEL = "mine"


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


def test_a_key_has_its_replica_and_keeps_it_when_others_come_and_go() -> None:
    replicas = [replica(name) for name in "abcd"]
    keys = [str(number) for number in range(400)]
    first = {key: ranked(replicas, key)[0] for key in keys}
    shares = [sum(one is other for one in first.values()) for other in replicas]
    assert min(shares) > 60
    left = replicas[:-1]
    for key, one in first.items():
        assert ranked(list(reversed(replicas)), key)[0] is one
        if one in left:
            assert ranked(left, key)[0] is one


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]},) * 2 + (True,),
        ({"messages": [{"content": "a"}, {"content": "b"}]}, {"messages": [{"content": "a"}]}, True),
        ({"messages": [{"content": "a"}]}, {"messages": [{"content": "b"}]}, False),
        ({"prompt": "a"}, {"prompt": ["a", "b"]}, True),
        ({"prompt": [1, 2]}, {"prompt": [[1, 2], [3]]}, True),
        ({"prompt": "x" * 600 + "a"}, {"prompt": "x" * 600 + "b"}, True),
        ({"input": "a", "instructions": "b"}, {"input": "c", "instructions": "b"}, True),
        ({"input": [{"content": "a"}]}, {"input": "a"}, True),
    ],
)
def test_prompts_that_begin_alike_have_the_same_key(one: Any, other: Any, same: bool) -> None:
    found = [key_of(json.dumps(body).encode()) for body in (one, other)]
    assert all(found)
    assert (found[0] == found[1]) == same


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b"{}", b'{"messages": []}', b"[" * 100_000])
def test_what_is_no_request_has_none(body: bytes) -> None:
    assert key_of(body) == ""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "missing required field `engine`"),
        ({"engine": "a", "replicas": 2}, "unknown field `replicas`"),
        ({"engine": "a", "max_batch": "many"}, r"Expected `int`.*max_batch"),
        ({"engine": "a", "min_replicas": "3", "max_replicas": "2"}, "max_replicas is 2, fewer than min_replicas, 3"),
    ],
)
def test_options_that_do_not_fit(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        options_of(given)


def test_every_option_may_be_a_string_as_on_a_command_line() -> None:
    given = {name: "1" for name in Options.__struct_fields__ if name not in ("adapt", "device", "route_by_prefix")}
    found = options_of({**given, "adapt": "false", "route_by_prefix": "false"})
    assert (found.max_batch, found.num_gpus, found.threads, found.adapt) == (1, 1.0, 1, False)


@pytest.fixture(scope="module")
def url(tiny_engine: Path) -> Iterator[str]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": ROOT}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    options = {"min_replicas": 2, "max_replicas": 2, "threads": 1, "adapt": False, "models": MODEL, "max_batch": 4}
    serve.run(build({"engine": str(tiny_engine), **options}), name="ht")
    yield f"http://127.0.0.1:{PORT}"
    serve.shutdown()
    ray.shutdown()


def ask(url: str, system: str, user: str, **more: Any) -> httpx.Response:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0, **more}
    return httpx.post(url + CHAT, json=body, timeout=60)


def replicas_of(application: str = "ht") -> dict[str, int]:
    """Return how many replicas are in which state."""
    states: dict[Any, int] = dict(serve.status().applications[application].deployments["Replica"].replica_states)
    return {str(getattr(state, "value", state)): count for state, count in states.items() if count}


def names_of(application: str) -> list[str]:
    """Return the names of the actors that are an application's replicas."""
    return [
        one["name"]
        for one in ray.util.list_named_actors(all_namespaces=True)
        if f"{application}#Replica#" in one["name"]
    ]


class Clients:
    """Clients that ask again and again, each about its own persona, until they are told to `leave`."""

    def __init__(self, url: str, personas: Sequence[str], **asked: Any) -> None:
        self.ended: list[tuple[float, str]] = []
        self._over = threading.Event()
        self._url, self._asked = url, {"ignore_eos": True, "stream": True, **asked}
        self._threads = [threading.Thread(target=self._ask, args=(persona,)) for persona in personas]
        for one in self._threads:
            one.start()

    def _ask(self, persona: str) -> None:
        while not self._over.is_set():
            found = ask(self._url, persona, "Hello", **self._asked)
            whole = found.status_code == 200 and found.text.endswith("data: [DONE]\n\n") and '"error"' not in found.text
            self.ended.append((time.monotonic(), "whole" if whole else found.text[-400:]))

    def leave(self) -> None:
        """Let requests under way end."""
        self._over.set()
        for one in self._threads:
            one.join(60)
            assert not one.is_alive()


@pytest.mark.long
def test_text_is_the_generators_and_cached_prompts_are_found(url: str, tiny_engine: Path) -> None:
    with Generator(tiny_engine, threads=1, adapt=False) as generator:
        for persona in range(6):
            system = f"Persona {persona} is brief, kind and likes all of the sea."
            for number in range(3):
                found = ask(url, system, f"Question {number}").json()
                messages = [{"role": "system", "content": system}, {"role": "user", "content": f"Question {number}"}]
                expected = generator.generate(messages, max_new_tokens=8, escape_special_tokens=True)
                assert found["choices"][0]["message"]["content"] == expected.text
                cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
                # The first of them may find what another persona has begun with.
                assert (cached > len(system)) == (number > 0)


@pytest.mark.long
def test_streams_errors_and_what_is_told_pass_through(url: str) -> None:
    with httpx.stream(
        "POST", url + CHAT, json={"model": MODEL, "messages": [{"role": "user", "content": "a"}], "stream": True}
    ) as found:
        lines = [line for line in found.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 3
    assert ask(url, "a", "b", n=0).json()["error"]["param"] == "n"
    assert ask(url, "a", "y" * 400).json()["error"]["code"] == "context_length_exceeded"
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == MODEL
    assert httpx.post(url + CHAT, content=b"x").status_code == 415


@pytest.mark.long
def test_a_replica_that_is_lost_takes_only_its_running_requests_with_it(url: str) -> None:
    clients = Clients(url, [f"Persona {number} is brief and kind." for number in range(8)], max_tokens=100)
    time.sleep(4)
    actors = names_of("ht")
    assert len(actors) == 2
    killed = time.monotonic()
    ray.kill(ray.get_actor(actors[0], namespace="serve"))
    time.sleep(8)
    clients.leave()
    lost = [(at, told) for at, told in clients.ended if told != "whole"]
    assert 0 < len(lost) <= 8
    assert all(killed <= at <= killed + 5 and "replica_lost" in told for at, told in lost)
    assert sum(told == "whole" and at > killed + 1 for at, told in clients.ended) > 8
    # And there are two again.
    until(lambda: replicas_of() == {"RUNNING": 2}, 60)
    assert ask(url, "a", "b").status_code == 200


@pytest.mark.long
def test_replicas_come_with_the_load_and_go_without_it_and_nothing_is_lost(url: str, tiny_engine: Path) -> None:
    options = {"max_replicas": 2, "threads": 1, "adapt": False, "models": MODEL, "max_batch": 2}
    delays = {"upscale_s": 1, "downscale_s": 2, "drain_s": 60}
    # Beneath a path of its own, too.
    serve.run(build({"engine": str(tiny_engine), **options, **delays}), name="more", route_prefix="/more")
    here = f"{url}/more"
    assert replicas_of("more") == {"RUNNING": 1}
    many = Clients(here, [f"Persona {number}" for number in range(6)], max_tokens=150, n=2, speculate=False)
    until(lambda: replicas_of("more") == {"RUNNING": 2}, 60)
    # One for each replica goes on, so that whichever goes has a request under way.
    replicas = [replica(name.rpartition("#")[2]) for name in names_of("more")]
    firsts: dict[str, str] = {}
    for number in range(100):
        persona = f"Other persona {number}"
        body = {"messages": [{"role": "system", "content": persona}]}
        chosen = ranked(replicas, key_of(json.dumps(body).encode()))[0]
        firsts.setdefault(chosen.replica_id.unique_id, persona)
    few = Clients(here, list(firsts.values()), max_tokens=150, n=2, speculate=False)
    assert len(firsts) == 2
    many.leave()
    before = len(few.ended)
    until(lambda: replicas_of("more") == {"RUNNING": 1}, 90)
    few.leave()
    assert len(few.ended) > before
    assert {told for _, told in [*many.ended, *few.ended]} == {"whole"}
    assert len(names_of("more")) == 1
    serve.delete("more")


@pytest.mark.long
def test_a_client_that_leaves_frees_its_slot(url: str) -> None:
    def running() -> float:
        # Each replica in turn has its own: keys are tried until both have been asked.
        text = httpx.get(f"{url}/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("ht_num_requests_running{"))

    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "stream": True, "n": 4, "ignore_eos": True}
    with httpx.stream("POST", url + CHAT, json=body) as found:
        next(found.iter_lines())
    until = time.monotonic() + 10
    while any(running() for _ in range(6)):
        assert time.monotonic() < until
        time.sleep(0.1)
