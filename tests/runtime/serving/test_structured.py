"""Structured answers over HTTP: formats, grammars and regular expressions, and OpenAI's client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx", "openai", "llguidance"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

import openai
from pydantic import BaseModel

from runtime import Generator, Grammar, Sampling
from tests.runtime.serving.live import CHAT, RESPONSES, TEXT, Live

HELLO: Any = [{"role": "user", "content": "Hello"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "good": {"type": "boolean"}},
    "required": ["kind", "good"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
GRAMMAR = 'start: "a" start? "b"\n'


class Animal(BaseModel):
    """What a client asks for."""

    kind: Literal["cat", "dog"]
    good: bool
    friends: list[Literal["cat", "dog"]] | None


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_in_a_schema_is_what_the_generator_answers_whole_and_streamed(live: Live, generator: Generator) -> None:
    expected = generator.generate("Hello", sampling=Sampling(grammar=Grammar.json_schema(SCHEMA))).text
    wanted = {"type": "json_schema", "json_schema": {"name": "animal", "strict": True, "schema": SCHEMA}}
    for speculate in (True, False):
        asked = {"messages": HELLO, "temperature": 0, "response_format": wanted, "speculate": speculate}
        choice = live.ask(CHAT, **asked)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
        events = live.events(CHAT, **asked)
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == expected
    found = json.loads(expected)
    assert list(found) == ["kind", "good"]


def test_any_json_object(live: Live) -> None:
    found = live.ask(CHAT, messages=HELLO, max_tokens=40, seed=1, response_format={"type": "json_object"})
    (choice,) = found["choices"]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_every_endpoint_takes_a_grammar_and_a_regular_expression(live: Live) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": HELLO, "max_tokens": 40}),
        (TEXT, {"prompt": "Hello", "max_tokens": 40}),
        (RESPONSES, {"input": "Hello", "max_output_tokens": 40}),
    ]
    for path, body in asked:
        for seed in (1, 2):
            found = live.ask(path, regex="(yes|no), [0-9]{2}", seed=seed, **body)
            assert re.fullmatch("(yes|no), [0-9]{2}", text_of(path, found))
            text = text_of(path, live.ask(path, grammar=GRAMMAR, seed=seed, **body))
            assert text.startswith("a" * (len(text) - text.count("b")))


def text_of(path: str, found: Any) -> str:
    if path == RESPONSES:
        return str(found["output"][0]["content"][0]["text"])
    choice = found["choices"][0]
    return str(choice["text"] if path == TEXT else choice["message"]["content"])


def test_a_response_repeats_its_format(live: Live) -> None:
    wanted = {"type": "json_schema", "name": "animal", "schema": SCHEMA, "strict": True}
    found = live.ask(RESPONSES, input="Hello", temperature=0, text={"format": wanted})
    assert found["status"] == "completed"
    assert set(json.loads(text_of(RESPONSES, found))) == {"kind", "good"}
    assert found["text"]["format"] == {**wanted, "description": None}
    plain = live.ask(RESPONSES, input="Hello", max_output_tokens=2)
    assert plain["text"] == {"format": {"type": "text"}}


def test_openais_client_parses_answers_into_models(live: Live, client: openai.OpenAI, generator: Generator) -> None:
    # A random model could write white space for ever.
    spaces = {str(generator.encode(space, raw=True)[-1]): -100 for space in " \n\t\r"}
    chat = client.chat.completions.parse(
        model=live.name, messages=HELLO, response_format=Animal, temperature=0, logit_bias=spaces
    )
    animal = chat.choices[0].message.parsed
    assert animal is not None
    assert animal.kind in ("cat", "dog")
    response = client.responses.parse(
        model=live.name, input="Hello", text_format=Animal, temperature=0, extra_body={"logit_bias": spaces}
    )
    assert response.output_parsed == animal


def test_several_answers_are_each_in_the_grammar(live: Live) -> None:
    found = live.ask(CHAT, messages=HELLO, n=3, seed=4, regex="[a-z]{3}")
    texts = [choice["message"]["content"] for choice in found["choices"]]
    assert all(re.fullmatch("[a-z]{3}", text) for text in texts)


def test_compiling_is_counted(live: Live) -> None:
    for _ in range(2):
        live.ask(CHAT, messages=HELLO, regex="counted [0-9]")
    told = live.client.get("/metrics").text
    for name in ("grammars_compiled", "grammars_refused", "grammar_cache_hits", "grammar_compile_seconds"):
        assert re.search(rf"^ht_{name}_total\{{.*\}} [0-9.e-]+$", told, re.MULTILINE), name
