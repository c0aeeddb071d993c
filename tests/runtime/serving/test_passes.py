"""`stream_options.include_passes`: streams that tell of the trees that were verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

import openai
from jsonschema_rs import validator_for
from openai.types.chat import ChatCompletionChunk
from pydantic import TypeAdapter

from runtime import Generator
from runtime.serving.pieces import Pieces
from tests.runtime.serving.live import CHAT, RESPONSES, TEXT, Live

HELLO: Any = [{"role": "user", "content": "Hello"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 24}
PASSES: Any = {"stream_options": {"include_passes": True}}


def passes(events: list[Any], index: int = 0) -> list[Any]:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return [one for choice in choices for one in choice.get("passes", [])]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stream_tells_what_the_generators_trace_has(live: Live, generator: Generator, path: str) -> None:
    asked: Any = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    expected = generator.generate("Hello", max_new_tokens=24, raw=path == TEXT, trace=True)
    assert expected.passes is not None
    events = live.events(path, **asked, **GREEDY, **PASSES)
    found = [one for one in passes(events) if one["tokens"]]
    known = Pieces(generator)
    traced = [one for one in expected.passes if one.tokens]
    assert len(found) == len(traced)
    for told, one in zip(found, traced, strict=True):
        assert told["prompt"] == one.prompt
        if not one.prompt:
            assert (told["rows"], told["pseudo_rows"]) == (one.rows, list(one.pseudo_rows))
        assert told["seconds"] > 0
        assert told["accepted"] == list(one.accepted)
        assert [node["text"] for node in told["nodes"]] == [known.of(node.token).text for node in one.nodes]
        assert [(node["token"], node["parent"], node["probability"], node["sources"]) for node in told["nodes"]] == [
            (node.token, node.parent, pytest.approx(node.probability), list(node.sources)) for node in one.nodes
        ]
        assert [(token["token"], token["adds"]) for token in told["tokens"]] == list(
            zip(one.tokens, one.texts, strict=True)
        )
        assert [token["text"] for token in told["tokens"]] == [known.of(token).text for token in one.tokens]
    assert "".join(token["adds"] for one in found for token in one["tokens"]) == expected.text


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_passes_show_no_drafts_from_what_others_were_answered(serve: Callable[..., Live], path: str) -> None:
    live = serve({"text_pool_tokens": 1000})
    asked: Any = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    for _ in range(3):
        events = live.events(path, **asked, **GREEDY, **PASSES)
        assert not any("pool" in node["sources"] for one in passes(events) for node in one.get("nodes", []))
        live.events(path, **asked, **GREEDY)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_without_being_asked_for_no_chunk_has_passes(live: Live, path: str) -> None:
    asked: Any = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    for options in ({}, {"stream_options": {"include_passes": False}}):
        events = live.events(path, **asked, **GREEDY, **options)
        assert not any("passes" in choice for event in events for choice in event["choices"])


def test_each_of_several_answers_has_its_own_passes(live: Live) -> None:
    events = live.events(CHAT, messages=HELLO, n=2, temperature=1, seed=3, max_tokens=12, **PASSES)
    for index in range(2):
        content = [
            choice["delta"].get("content") or ""
            for event in events
            for choice in event["choices"]
            if choice["index"] == index
        ]
        assert "".join(t["adds"] for one in passes(events, index) for t in one["tokens"]) == "".join(content)


def test_openais_client_takes_a_stream_with_passes(live: Live) -> None:
    for event in live.events(CHAT, messages=HELLO, **GREEDY, **PASSES):
        TypeAdapter(ChatCompletionChunk).validate_python(event)
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"extra_body": PASSES, **GREEDY}
        stream = client.chat.completions.create(model=live.name, messages=HELLO, stream=True, **asked)
        text = adds = ""
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            for one in (chunk.choices[0].model_extra or {}).get("passes", []):
                adds += "".join(token["adds"] for token in one["tokens"])
    assert text == adds != ""


def test_the_document_describes_them(live: Live) -> None:
    schemas = live.client.get("/openapi.json").json()["components"]["schemas"]
    for event in live.events(CHAT, messages=HELLO, **GREEDY, **PASSES):
        schema = {"$ref": "#/components/schemas/ChatChunk", "components": {"schemas": schemas}}
        validator_for(schema).validate(event)
    assert "include_passes" in schemas["StreamOptions"]["properties"]
    assert "passes" not in schemas["ChunkChoice"].get("required", [])


def test_what_has_no_passes_to_tell_refuses_them(live: Live) -> None:
    found = live.client.post(RESPONSES, json={"model": live.name, "input": "Hello", "stream": True, **PASSES})
    assert found.status_code == 400
    assert "leave include_passes out" in found.json()["error"]["message"]
    found = live.client.post(CHAT, json={"model": live.name, "messages": HELLO, **PASSES})
    assert found.status_code == 400
    assert "set stream" in found.json()["error"]["message"]
