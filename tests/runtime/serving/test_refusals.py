"""What does not fit, or cannot be honoured, is refused with OpenAI's error: its message says what to do."""

from __future__ import annotations

from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

from tests.runtime.serving.live import CHAT, RESPONSES, TEXT, Live

HELLO = [{"role": "user", "content": "Hello"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
NAMED = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}
TOOL = {"type": "function", "function": {"name": "f"}}


def named(schema: Any, name: str = "a") -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def refused(live: Live, path: str, body: dict[str, Any], status: int = 400) -> dict[str, Any]:
    found = live.client.post(path, json=body)
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"temperature": -0.1}, "temperature", "Expected `float` >= 0.0"),
        ({"temperature": 2.1}, "temperature", "Expected `float` <= 2.0"),
        ({"temperature": 0.001}, "temperature", "temperature must be 0 (greedy) or 0.01 to 100"),
        ({"temperature": "hot"}, "temperature", "Expected `float | null`, got `str`"),
        ({"temperature": True}, "temperature", "got `bool`"),
        ({"top_p": 0}, "top_p", "Expected `float` > 0.0"),
        ({"top_p": 1.1}, "top_p", "Expected `float` <= 1.0"),
        ({"top_k": -2}, "top_k", "Expected `int` >= -1"),
        ({"top_k": 1.5}, "top_k", "Expected `int | null`, got `float`"),
        ({"min_p": 1.5}, "min_p", "Expected `float` <= 1.0"),
        ({"presence_penalty": 3}, "presence_penalty", "<= 2.0"),
        ({"frequency_penalty": -3}, "frequency_penalty", ">= -2.0"),
        ({"repetition_penalty": 0}, "repetition_penalty", ">= 0.01"),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]", "<= 100.0"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "matching regex"),
        ({"logit_bias": {str(token): 1 for token in range(4097)}}, "logit_bias", "length <= 4096"),
        ({"logit_bias": {"05": 1}}, "logit_bias", "matching regex"),
        ({"logit_bias": {"5\n": 1}}, "logit_bias", "logit_bias has '5\\n'; give token ids such as '5'"),
        ({"logit_bias": {"264": 1}}, None, "logit_bias has token 264; this model's tokens are 0 to 263"),
        ({"seed": 1.5}, "seed", "Expected `int | null`"),
        ({"seed": 1 << 63}, "seed", "Expected `int` <= 9223372036854775807"),
        ({"stop": ""}, "stop", "length >= 1"),
        ({"stop": ["a"] * 17}, "stop", "length <= 16"),
        ({"stop": [1]}, "stop[0]", "Expected `str`"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "give one of them"),
        ({"max_tokens": 5, "min_tokens": 6}, None, "min_new_tokens is 6, more than max_new_tokens, 5"),
        ({"n": 0}, "n", ">= 1"),
        ({"n": 129}, "n", "129 answers, and this server allows 128"),
        ({"top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
        ({"priority": 1001}, "priority", "<= 1000"),
        ({"deadline": -1}, "deadline", ">= 0.0"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more", "no field that this server knows"),
        ({"store": True}, "store", "nothing is stored here"),
        ({"metadata": {"a": 1}}, "metadata[...]", "Expected `str`"),
        ({"user": 5}, "user", "Expected `str | null`"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "Invalid value 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        ({"response_format": named({}, name="a b")}, "response_format.json_schema.name", "matching regex"),
        ({"response_format": named([])}, None, "a JSON schema must be an object, true or false"),
        ({"response_format": named({"type": "nothing"})}, None, "Invalid type: nothing"),
        ({"response_format": named({"uniqueItems": True})}, None, "uniqueItems"),
        ({"response_format": named({"$ref": "https://example.org/schema"})}, None, "https://example.org/schema"),
        ({"response_format": named({}), "regex": "a"}, "response_format", "response_format and regex cannot be had"),
        ({"grammar": 'start: "a"', "regex": "a"}, "grammar", "grammar and regex cannot be had together"),
        ({"grammar": ""}, "grammar", "length >= 1"),
        ({"grammar": "start: b"}, None, "the grammar cannot be used"),
        ({"regex": "("}, None, "the regular expression cannot be used: "),
        ({"regex": "("}, None, "regex parse error: unclosed group"),
        ({"response_format": named({"if": {}})}, None, 'the JSON schema cannot be used: Unimplemented keys: ["if"]'),
        ({"regex": "a", "ignore_eos": True}, None, "ignore_stop_tokens cannot be had with a grammar"),
        ({"regex": "a", "min_tokens": 2}, None, "min_new_tokens cannot be had with a grammar"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "tools are functions"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"functions": [{}]}, "functions", "give tools in its place"),
        ({"modalities": ["audio"]}, "modalities[0]", "answers are text"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio", "answers are text"),
        ({"prediction": "a"}, "prediction", "Expected `object | null`, got `str`"),
        ({"prediction": {"content": "a"}}, "prediction.type", "prediction.type is missing"),
        ({"prediction": {"type": "file", "content": "a"}}, "prediction.type", "Invalid enum value 'file'"),
        ({"prediction": {"type": "content", "content": 5}}, "prediction.content", "got `int`"),
        ({"prediction": {"type": "content", "content": [IMAGE]}}, "prediction.content[0].type", "image_url"),
        ({"prediction": {"type": "content", "content": "a", "more": 1}}, "prediction.more", "no field that this"),
        ({"prediction": {"type": "content", "content": "a" * 257}}, None, "the prediction has more than 256 tokens"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "reasoning cannot be set"),
        ({"web_search_options": {}}, "web_search_options", "this server searches nothing"),
        ({"service_tier": "flex"}, "service_tier", "Invalid enum value 'flex'"),
        ({"a\nb": 1}, "a b", "a b cannot be honoured"),
        ({"surprise": 1}, "surprise", "surprise cannot be honoured: it is no field that this server knows"),
        ({"messages": []}, "messages", "length >= 1"),
        ({"messages": "Hello"}, "messages", "Expected `array`"),
        ({"messages": [{"role": "function", "content": "a"}]}, "messages[0].role", "of the roles system, developer"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "messages[0].role is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "got `null`"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type", "made of text"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].function",
            "is missing",
        ),
    ],
)
def test_a_chat_that_does_not_fit(live: Live, body: dict[str, Any], param: str | None, told: str) -> None:
    error = refused(live, CHAT, {"model": live.name, "messages": HELLO, **body})
    assert error["param"] == param
    assert told in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"prompt": []}, "prompt", "prompt must be a string"),
        ({"prompt": None}, "prompt", "prompt must be a string"),
        ({"prompt": [[]]}, "prompt", "prompt must be a string"),
        ({"prompt": ["a", 1]}, "prompt", "prompt must be a string"),
        ({"prompt": [1, True]}, "prompt", "prompt must be a string"),
        ({"prompt": {"text": "a"}}, "prompt", "prompt must be a string"),
        ({"prompt": [264]}, None, "each token of a prompt must be at most 263, not 264"),
        ({"prompt": ""}, None, "the prompt is empty"),
        ({"best_of": 2}, "best_of", "every answer is sent; set n"),
        ({"best_of": 1, "n": 2}, "best_of", "leave best_of out"),
        ({"suffix": "."}, "suffix", "continues texts and fills no gaps"),
        ({"logprobs": 21}, "logprobs", "<= 20"),
        ({"logprobs": True}, "logprobs", "Expected `int | null`"),
        ({"max_tokens": 0}, "max_tokens", "for echo with logprobs"),
        ({"max_tokens": 0, "echo": True}, "max_tokens", "for echo with logprobs"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream", "cannot be streamed"),
        ({"prompt": ["a"] * 65, "n": 2}, "n", "130 answers, and this server allows 128"),
        ({"messages": HELLO}, "messages", "messages cannot be honoured"),
    ],
)
def test_a_completion_that_does_not_fit(live: Live, body: dict[str, Any], param: str | None, told: str) -> None:
    error = refused(live, TEXT, {"model": live.name, "prompt": "Hello", **body})
    assert error["param"] == param
    assert told in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"input": []}, "input", "length >= 1"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role", "of the roles system, developer"),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output", "is missing"),
        ({"input": [{"type": "function_call"}]}, "input[0].call_id", "is missing"),
        (
            {"input": [{"role": "user", "content": "a", "name": "b"}]},
            "input[0].name",
            "no part of an item of type",
        ),
        ({"input": [{"type": "reasoning"}]}, "input[0].type", "made of text"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation as input"),
        ({"conversation": "c"}, "conversation", "send the whole conversation as input"),
        ({"background": True}, "background", "nothing goes on in the background"),
        ({"store": True}, "store", "nothing is stored here"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "tools are functions"),
        ({"text": {"format": NAMED}}, "text.format.json_schema", "cannot be honoured"),
        ({"text": {"format": {"type": "json_object"}}, "regex": "a"}, "text.format", "text.format and regex"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "reasoning cannot be set"),
        ({"include": ["file_search_call.results"]}, "include[0]", "Invalid enum value"),
        ({"top_logprobs": 2}, "top_logprobs", "in include"),
        ({"truncation": "auto"}, "truncation", "shorten them"),
        ({"n": 2}, "n", "n cannot be honoured"),
    ],
)
def test_a_response_that_does_not_fit(live: Live, body: dict[str, Any], param: str, told: str) -> None:
    error = refused(live, RESPONSES, {"model": live.name, "input": "Hello", **body})
    assert error["param"] == param
    assert told in error["message"]


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (TEXT, "prompt"), (RESPONSES, "input")])
def test_what_is_needed_is_named(live: Live, path: str, field: str) -> None:
    assert refused(live, path, {field: HELLO if field == "messages" else "a"})["message"] == "model is missing"
    error = refused(live, path, {"model": live.name})
    assert (error["param"], error["code"]) == (field, "missing_required_parameter")


def test_a_model_that_is_not_here(live: Live) -> None:
    error = refused(live, CHAT, {"model": "gpt-4o", "messages": HELLO}, 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert live.client.get("/v1/models/gpt-4o").status_code == 404


def test_a_base_url_without_v1_is_told_where_the_place_is(live: Live) -> None:
    error = refused(live, CHAT.removeprefix("/v1"), {"model": live.name, "messages": HELLO}, 404)
    assert error["message"] == (
        "there is nothing at /chat/completions; there is /v1/chat/completions: let the client's base URL end with /v1"
    )
    assert refused(live, "/chat", {}, 404)["message"] == "there is nothing at /chat"


@pytest.mark.parametrize("size", [300, 5000, 1_500_000])
@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (TEXT, "prompt"), (RESPONSES, "input")])
def test_a_prompt_that_leaves_no_room(live: Live, path: str, field: str, size: int) -> None:
    text = "y" * size
    asked = {field: [{"role": "user", "content": text}] if path == CHAT else text}
    error = refused(live, path, {"model": live.name, **asked})
    assert (error["code"], error["param"]) == ("context_length_exceeded", field)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "\\ud800"}',
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_what_is_no_request_at_all(live: Live, path: str, body: bytes) -> None:
    found = live.client.post(path, content=body, headers={"content-type": "application/json"})
    assert found.status_code == 400
    assert found.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_web_page_cannot_ask_unasked(live: Live, media: str | None) -> None:
    headers = {} if media is None else {"content-type": media}
    found = live.client.post(CHAT, content=b'{"model": "a"}', headers=headers)
    assert found.status_code == 415


def test_places_and_methods_that_there_are_not(live: Live) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("POST", "/v1/models", 405)):
        found = live.client.request(method, path)
        assert found.status_code == status
        assert found.json()["error"]["message"]
