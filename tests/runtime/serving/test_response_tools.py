"""Tools in POST /v1/responses: items of calls and of what came of them, whole and as events."""

from __future__ import annotations

import json
from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx", "openai", "llguidance", "jsonschema_rs"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

from openai import OpenAI

from tests.runtime.serving.live import CHAT, RESPONSES
from tests.runtime.serving.tools import KINDS, PARIS, RUN, SUM, TOOLS, Models, check_fits, written

FLAT: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
GREEDY: Any = {"input": "Hello", "temperature": 0, "max_output_tokens": 300, "tools": FLAT}
TWO = [("get_weather", PARIS), ("add", SUM)]


def told(items: list[Any]) -> list[Any]:
    return [
        (item["name"], item["arguments"]) if item["type"] == "function_call" else item["content"][0]["text"]
        for item in items
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_calls_are_items_streamed_or_not(models: Models, kind: str) -> None:
    speaking, live = models[kind]
    for text, items in (
        ("Hello.", ["Hello."]),
        ("", [""]),
        (written(kind, *TWO), TWO),
        (f"Wait. {written(kind, *TWO)}", ["Wait.", *TWO]),
    ):
        # Nothing at all is its end at once.
        speaking.say(text) if text else setattr(speaking.speaker, "says", [2])
        whole = live.ask(RESPONSES, **GREEDY)
        assert told(whole["output"]) == items
        assert whole["status"] == "completed"
        assert {item["status"] for item in whole["output"]} == {"completed"}
        events = live.events(RESPONSES, **GREEDY)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert told(events[-1]["response"]["output"]) == items
        added = [event for event in events if event["type"] == "response.output_item.added"]
        done = [event for event in events if event["type"] == "response.output_item.done"]
        assert [event["output_index"] for event in added] == [event["output_index"] for event in done]
        assert [event["item"] for event in done] == events[-1]["response"]["output"]
        pieces = [""] * len(items)
        for event in events:
            if event["type"].endswith(".delta"):
                pieces[event["output_index"]] += event["delta"]
                assert event["item_id"] == added[event["output_index"]]["item"]["id"]
        assert pieces == [item[1] if isinstance(item, tuple) else item for item in items]


def test_a_call_that_is_forced_fits_its_schema(models: Models) -> None:
    speaking, live = models["qwen"]
    speaking.say("")
    for choice in ("required", {"type": "function", "name": "add"}):
        found = live.ask(RESPONSES, **GREEDY, tool_choice=choice, parallel_tool_calls=False)
        (item,) = found["output"]
        check_fits([(item["name"], item["arguments"])])
        assert (found["tool_choice"], found["tools"][0]["name"]) == (choice, "get_weather")


def test_a_call_that_its_length_ends_is_incomplete(models: Models) -> None:
    speaking, live = models["qwen"]
    speaking.say(written("qwen", *TWO[:1]))
    found = live.ask(RESPONSES, **{**GREEDY, "max_output_tokens": 52})
    assert found["status"] == found["output"][0]["status"] == "incomplete"
    assert PARIS.startswith(found["output"][0]["arguments"])


def test_the_clients_loop_has_the_prompt_of_chats(models: Models) -> None:
    for kind in KINDS:
        speaking, live = models[kind]
        client = OpenAI(base_url=f"{live.url}/v1", api_key="none")
        speaking.say(written(kind, *TWO[:1]))
        asked: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
        first = client.responses.create(model=live.name, input=asked, tools=FLAT, temperature=0)
        asked += first.output
        chat: list[Any] = [*asked[:1], {"role": "assistant", "tool_calls": []}]
        for item in first.output:
            assert item.type == "function_call"
            result = RUN[item.name](**json.loads(item.arguments))
            asked.append({"type": "function_call_output", "call_id": item.call_id, "output": result})
            function = {"name": item.name, "arguments": item.arguments}
            chat[1]["tool_calls"].append({"id": item.call_id, "type": "function", "function": function})
            chat.append({"role": "tool", "tool_call_id": item.call_id, "content": result})
        speaking.say("It is warm.")
        last = client.responses.create(model=live.name, input=asked, tools=FLAT, temperature=0)
        assert last.output_text == "It is warm."
        same = live.ask(CHAT, messages=chat, tools=TOOLS, temperature=0)
        assert last.usage is not None
        assert last.usage.input_tokens == same["usage"]["prompt_tokens"]


def test_log_probabilities_are_not_had_with_tools(models: Models) -> None:
    _, live = models["plain"]
    body = {"model": live.name, **GREEDY, "include": ["message.output_text.logprobs"]}
    found = live.client.post(RESPONSES, json=body)
    assert found.status_code == 400
    assert found.json()["error"]["param"] == "include"
    assert live.client.post(RESPONSES, json={**body, "tool_choice": "none"}).status_code == 200
