"""OpenAI's own client, whose types every answer fits, and requests that nobody here wrote."""

from __future__ import annotations

import asyncio
import typing
from collections.abc import Iterator
from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

import openai
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from runtime import Generator
from tests.runtime.serving.live import CHAT, RESPONSES, TEXT, Live

HELLO: Any = [{"role": "user", "content": "Hello"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 24}


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_every_answer_fits_the_clients_types(live: Live) -> None:
    """The client itself takes what comes; pydantic does not."""
    asked = {"logprobs": True, "top_logprobs": 2, **GREEDY}
    TypeAdapter(ChatCompletion).validate_python(live.ask(CHAT, messages=HELLO, **asked))
    for event in live.events(CHAT, messages=HELLO, stream_options={"include_usage": True}, **asked):
        TypeAdapter(ChatCompletionChunk).validate_python(event)
    TypeAdapter(Completion).validate_python(live.ask(TEXT, prompt="Hello", logprobs=2, **GREEDY))
    respond = {"input": "Hello", "temperature": 0, "max_output_tokens": 24, "include": ["message.output_text.logprobs"]}
    TypeAdapter(Response).validate_python(live.ask(RESPONSES, **respond))
    kinds: Any = typing.get_args(ResponseStreamEvent)[0]
    for event in live.events(RESPONSES, **respond):
        TypeAdapter(kinds).validate_python(event)


def test_chats(live: Live, client: openai.OpenAI, generator: Generator) -> None:
    expected = generator.generate("Hello", max_new_tokens=24)
    found = client.chat.completions.create(model=live.name, messages=HELLO, **GREEDY)
    assert found.choices[0].message.content == expected.text
    assert found.usage is not None
    assert found.usage.completion_tokens_details is not None
    assert found.usage.completion_tokens_details.rejected_prediction_tokens == expected.candidates - (
        expected.accepted_candidates
    )
    stream = client.chat.completions.create(model=live.name, messages=HELLO, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected.text
    # These take no answer that its length has ended.
    start, stop = expected.text[:2], expected.text[2]
    assert stop not in start
    with client.chat.completions.stream(model=live.name, messages=HELLO, stop=stop, **GREEDY) as events:
        assert events.get_final_completion().choices[0].message.content == start
    parsed = client.chat.completions.parse(model=live.name, messages=HELLO, stop=stop, **GREEDY)
    assert parsed.choices[0].message.content == start


def test_extensions_go_in_the_extra_body(live: Live, client: openai.OpenAI) -> None:
    extra = {"top_k": 5, "repetition_penalty": 1.1, "speculate": False, "priority": 1, "deadline": 20}
    found = client.chat.completions.create(model=live.name, messages=HELLO, max_tokens=8, extra_body=extra)
    assert found.usage is not None
    assert found.usage.completion_tokens_details is not None
    assert found.usage.completion_tokens_details.accepted_prediction_tokens == 0


def test_completions(live: Live, client: openai.OpenAI, generator: Generator) -> None:
    found = client.completions.create(model=live.name, prompt="Hello", **GREEDY)
    assert found.choices[0].text == generator.generate("Hello", raw=True, max_new_tokens=24).text
    stream = client.completions.create(model=live.name, prompt="Hello", stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == found.choices[0].text


def test_responses(live: Live, client: openai.OpenAI, generator: Generator) -> None:
    expected = generator.generate("Hello", max_new_tokens=24).text
    asked: Any = {"model": live.name, "input": "Hello", "temperature": 0, "max_output_tokens": 24}
    assert client.responses.create(**asked).output_text == expected
    with client.responses.stream(**asked, extra_body={"stop": expected[2]}) as events:
        kinds = [event.type for event in events]
        assert events.get_final_response().output_text == expected[:2]
    assert kinds[0] == "response.created"
    # What came back goes back.
    first = client.responses.create(**asked)
    more: Any = [*HELLO, *first.output, {"role": "user", "content": "Go on"}]
    assert client.responses.create(**{**asked, "input": more}).output_text


def test_models(live: Live, client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert client.models.retrieve(model.id).id == model.id == live.name


def test_many_at_once_in_asyncio(live: Live, generator: Generator) -> None:
    prompts = [f"Number {place}" for place in range(8)]
    expected = [one.text for one in generator.generate(prompts, max_new_tokens=24)]

    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        messages: Any = [{"role": "user", "content": prompt}]
        stream = await client.chat.completions.create(model=live.name, messages=messages, stream=True, **GREEDY)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    assert asyncio.run(all_of_them()) == expected


def test_errors_are_the_clients_own(live: Live, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=live.name, messages=HELLO, n=1000)
    assert (caught.value.param, caught.value.code) == ("n", "invalid_value")
