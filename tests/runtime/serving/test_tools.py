"""Tools over HTTP: the client's loop, forced calls, streams, and what is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx", "openai", "llguidance", "jsonschema_rs"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

from openai import AsyncOpenAI, OpenAI

from runtime.serving import Settings
from tests.runtime.serving.live import CHAT, Live
from tests.runtime.serving.tools import (
    GREEDY,
    HELLO,
    KINDS,
    PARIS,
    REQUIRED,
    RUN,
    SUM,
    TOOLS,
    Models,
    check_fits,
    named,
    tool,
    written,
)


def joined(events: list[Any]) -> tuple[str, list[dict[str, Any]], str]:
    """Return what a stream's chunks add up to: content, calls, and how it finished."""
    content, finish = "", ""
    calls: list[dict[str, Any]] = []
    for event in events:
        (choice,) = event["choices"]
        delta = choice["delta"]
        content += delta.get("content") or ""
        for part in delta.get("tool_calls", []):
            if part["index"] == len(calls):
                assert part["type"] == "function" and part["id"]
                calls.append({"name": part["function"]["name"], "arguments": "", "id": part["id"]})
            else:
                assert part["index"] == len(calls) - 1 and part.keys() == {"index", "function"}
            calls[-1]["arguments"] += part["function"].get("arguments") or ""
        finish = choice["finish_reason"] or finish
    return content, calls, finish


def called(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one["function"]["name"], one["function"]["arguments"]) for one in message.get("tool_calls", [])]


@pytest.mark.parametrize("kind", KINDS)
def test_calls_in_free_text_are_told_apart_streamed_or_not(models: Models, kind: str) -> None:
    speaking, live = models[kind]
    two = [("get_weather", PARIS), ("add", SUM)]
    for text, content, calls in (
        ("Hello; you <tool> {}.", "Hello; you <tool> {}.", []),
        (written(kind, *two), None, two),
        (f"Wait. {written(kind, *two[:1])}", "Wait.", two[:1]),
    ):
        speaking.say(text)
        (choice,) = live.ask(CHAT, messages=HELLO, **GREEDY)["choices"]
        assert choice["message"]["content"] == content
        assert called(choice["message"]) == calls
        assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
        found = joined(live.events(CHAT, messages=HELLO, **GREEDY))
        assert found[0] == (content or "")
        assert [(one["name"], one["arguments"]) for one in found[1]] == calls
        assert found[2] == choice["finish_reason"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", ["required", named("add")])
def test_a_forced_call_fits_its_schema_whatever_the_model_would_say(
    models: Models, kind: str, streamed: bool, choice: Any
) -> None:
    speaking, live = models[kind]
    speaking.say("")
    texts = set()
    for seed in range(3):
        asked = {**GREEDY, "temperature": 1, "seed": seed, "tool_choice": choice, "parallel_tool_calls": False}
        if streamed:
            content, found, finish = joined(live.events(CHAT, messages=HELLO, **asked))
            calls = [(one["name"], one["arguments"]) for one in found]
        else:
            (answer,) = live.ask(CHAT, messages=HELLO, **asked)["choices"]
            content, calls, finish = (
                answer["message"]["content"] or "",
                called(answer["message"]),
                answer["finish_reason"],
            )
        assert content == ""
        assert len(calls) == 1
        check_fits(calls)
        texts.add(calls[0])
        if choice == "required":
            assert finish == "tool_calls"
        else:
            # As with OpenAI.
            assert (calls[0][0], finish) == ("add", "stop")
    assert len(texts) > 1


def test_a_forced_call_is_the_same_with_speculation_and_without(models: Models) -> None:
    for kind in KINDS:
        speaking, live = models[kind]
        speaking.say("")
        asked = {**GREEDY, "temperature": 1, "seed": 5, "tool_choice": "required", "parallel_tool_calls": False}
        whole = [live.ask(CHAT, messages=HELLO, **asked, speculate=way) for way in (True, False)]
        assert len({str(called(one["choices"][0]["message"])) for one in whole}) == 1
        assert whole[0]["usage"]["completion_tokens"] == whole[1]["usage"]["completion_tokens"]


def test_several_calls_may_be_required(models: Models) -> None:
    for kind in KINDS:
        speaking, live = models[kind]
        two = [("get_weather", PARIS), ("add", SUM)]
        speaking.say(written(kind, *two).removeprefix("<|python_tag|>"))
        (choice,) = live.ask(CHAT, messages=HELLO, **REQUIRED)["choices"]
        assert called(choice["message"]) == two
        (choice,) = live.ask(CHAT, messages=HELLO, **{**REQUIRED, "parallel_tool_calls": False})["choices"]
        assert called(choice["message"]) == two[:1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_strict_function_is_called_as_its_schema_says_in_free_text_too(models: Models, kind: str) -> None:
    speaking, live = models[kind]
    strict = {**GREEDY, "tools": [tool("get_weather", strict=True), tool("add")]}
    speaking.say("Hello.")
    (choice,) = live.ask(CHAT, messages=HELLO, **strict)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello.", "stop")
    # Goes on with what is allowed from where its own text is not.
    speaking.say(written(kind, ("get_weather", '{"city": "Berlin"}')))
    (choice,) = live.ask(CHAT, messages=HELLO, **{**strict, "parallel_tool_calls": False})["choices"]
    assert [name for name, _ in called(choice["message"])] == ["get_weather"]
    check_fits(called(choice["message"]))
    speaking.say(written(kind, ("add", '{"x": 1}')))
    (choice,) = live.ask(CHAT, messages=HELLO, **{**strict, "parallel_tool_calls": False})["choices"]
    assert called(choice["message"]) == [("add", '{"x": 1}')]


@pytest.mark.parametrize("kind", KINDS)
def test_the_clients_tool_loop(models: Models, kind: str) -> None:
    speaking, live = models[kind]
    client = OpenAI(base_url=f"{live.url}/v1", api_key="none")
    speaking.say("")
    messages: list[Any] = [{"role": "user", "content": "Weather in Paris, and 1 + 2?"}]
    for choice in (named("get_weather"), "required"):
        answer = client.chat.completions.create(
            model=live.name,
            messages=messages,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=0,
        )
        message = answer.choices[0].message
        assert message.tool_calls is not None
        messages.append(message)
        for call in message.tool_calls:
            assert call.type == "function"
            result = RUN[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    speaking.say("It is warm.")
    last = client.chat.completions.create(model=live.name, messages=messages, tools=TOOLS, temperature=0)
    assert (last.choices[0].message.content, last.choices[0].finish_reason) == ("It is warm.", "stop")
    # Without tools the conversation is still one.
    last = client.chat.completions.create(model=live.name, messages=messages, temperature=0)
    assert last.choices[0].message.content == "It is warm."


def test_the_asynchronous_clients_stream_of_calls(models: Models) -> None:
    speaking, live = models["qwen"]
    speaking.say(written("qwen", ("get_weather", PARIS), ("add", SUM)))

    async def ask() -> Any:
        client = AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none")
        asked: Any = {"model": live.name, "messages": HELLO, "tools": TOOLS, "temperature": 0}
        async with client, client.chat.completions.stream(**asked) as stream:
            kinds = [event.type async for event in stream]
            return kinds, await stream.get_final_completion()

    kinds, final = asyncio.run(ask())
    assert "tool_calls.function.arguments.delta" in kinds
    assert [(one.function.name, one.function.arguments) for one in final.choices[0].message.tool_calls] == [
        ("get_weather", PARIS),
        ("add", SUM),
    ]


def test_a_message_that_the_client_has_put_together_of_a_stream_is_taken_back(models: Models) -> None:
    speaking, live = models["plain"]
    speaking.say(written("plain", ("add", SUM)))
    client = OpenAI(base_url=f"{live.url}/v1", api_key="none")
    asked: Any = {"model": live.name, "tools": TOOLS, "temperature": 0}
    with client.chat.completions.stream(**asked, messages=HELLO) as stream:
        message: Any = stream.get_final_completion().choices[0].message
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "3"}
    speaking.say("It is 3.")
    last = client.chat.completions.create(**asked, messages=[*HELLO, message, result])
    assert last.choices[0].message.content == "It is 3."


def test_tools_are_for_the_model_alone_where_it_may_call_them(models: Models) -> None:
    speaking, live = models["qwen"]
    speaking.say("Hi.")
    counts = {
        name: live.ask(CHAT, messages=HELLO, temperature=0, **asked)["usage"]["prompt_tokens"]
        for name, asked in (
            ("nothing", {}),
            ("none", {"tools": TOOLS, "tool_choice": "none"}),
            ("empty", {"tools": []}),
            ("auto", {"tools": TOOLS}),
            ("strict", {"tools": [tool("get_weather", strict=True), tool("add", strict=False)]}),
        )
    }
    assert counts["nothing"] == counts["none"] == counts["empty"] < counts["auto"] == counts["strict"]
    text = written("qwen", ("add", SUM))
    speaking.say(text)
    (choice,) = live.ask(CHAT, messages=HELLO, **GREEDY, tool_choice="none")["choices"]
    # Its special tokens are left out, as in any text.
    assert choice["message"] == {
        "role": "assistant",
        "content": text.replace("<tool_call>", "").replace("</tool_call>", ""),
        "refusal": None,
    }


def test_a_call_that_its_length_ends_is_one_so_far(models: Models) -> None:
    speaking, live = models["qwen"]
    speaking.say(written("qwen", ("get_weather", PARIS)))
    asked = {**GREEDY, "max_tokens": 52}
    (choice,) = live.ask(CHAT, messages=HELLO, **asked)["choices"]
    ((name, arguments),) = called(choice["message"])
    assert (name, choice["finish_reason"]) == ("get_weather", "length")
    assert PARIS.startswith(arguments) and len(arguments) < len(PARIS)
    _, calls, finish = joined(live.events(CHAT, messages=HELLO, **asked))
    assert (calls[0]["arguments"], finish) == (arguments, "length")


def test_log_probabilities_are_of_every_token_of_a_call_too(models: Models) -> None:
    speaking, live = models["qwen"]
    speaking.say(written("qwen", ("add", SUM)))
    whole = live.ask(CHAT, messages=HELLO, **GREEDY, logprobs=True)
    tokens = [entry["token"] for entry in whole["choices"][0]["logprobs"]["content"]]
    assert len(tokens) == whole["usage"]["completion_tokens"]
    streamed = [
        entry["token"]
        for event in live.events(CHAT, messages=HELLO, **GREEDY, logprobs=True)
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == tokens


def test_several_answers_have_calls_of_their_own(models: Models) -> None:
    speaking, live = models["plain"]
    speaking.say("")
    asked = {**GREEDY, "temperature": 1, "seed": 1, "tool_choice": "required", "parallel_tool_calls": False, "n": 3}
    answer = live.ask(CHAT, messages=HELLO, **asked)
    found = [called(choice["message"]) for choice in answer["choices"]]
    assert [len(calls) for calls in found] == [1, 1, 1]
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]]
    assert len(set(ids)) == 3


def test_a_server_may_take_no_tools(models: Models) -> None:
    speaking, _ = models["plain"]
    live = Live(speaking.generator, Settings(warm_up=False, tools=False))
    try:
        found = live.client.post(CHAT, json={"model": live.name, "messages": HELLO, "tools": TOOLS})
        assert found.status_code == 400
        assert "takes no calls of tools" in found.json()["error"]["message"]
    finally:
        live.close()


@pytest.mark.parametrize(
    ("asked", "param", "told"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": named("another")}, "tool_choice", "names 'another', and the tools are add, get_weather"),
        ({"tools": [tool("add"), tool("add")]}, None, "two tools have the name 'add'"),
        ({"tools": [tool("add", name="no name")]}, "tools[0].function.name", "matching regex"),
        ({"tools": [tool("add", parameters=[1])]}, "tools[0].function.parameters", "Expected `object | null`"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "tools are functions"),
        ({"tools": [tool("add")] * 129}, "tools", "length <= 128"),
        ({"tools": [tool("add", parameters={"type": "array"})], "tool_choice": "required"}, "tools", "of type object"),
        (
            {"tools": [tool("add", parameters={"properties": {"a": {"items": [{}]}}})], "tool_choice": "required"},
            "tools",
            "the parameters of tool 'add': items cannot be a list",
        ),
        (
            {"tools": [tool("add", parameters={"properties": {"a": {"pattern": "("}}})], "tool_choice": "required"},
            None,
            "the grammar cannot be used",
        ),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tools", "no other format"),
        ({"tool_choice": "required", "min_tokens": 3}, "tool_choice", "min_new_tokens cannot be had with a grammar"),
        ({"tool_choice": "sometimes"}, "tool_choice", "none, auto, required"),
        ({"functions": [{}]}, "functions", "give tools in its place"),
        ({"function_call": "auto"}, "function_call", "give tool_choice in its place"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "there are no tool_calls"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].tool_call_id", "is missing"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].function",
            "is missing",
        ),
    ],
)
def test_tools_that_do_not_fit(models: Models, asked: dict[str, Any], param: str | None, told: str) -> None:
    _, live = models["plain"]
    body = {"model": live.name, "messages": HELLO, "tools": TOOLS, **asked}
    found = live.client.post(CHAT, json=body)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert told in error["message"]
    assert error["param"] == param
