"""POST /v1/responses, which keeps nothing."""

from __future__ import annotations

from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

from runtime import Generator, Sampling
from tests.runtime.serving.live import RESPONSES, Live

GREEDY: Any = {"temperature": 0, "max_output_tokens": 24}


@pytest.mark.parametrize(
    ("asked", "messages"),
    [
        ({"input": "Hello"}, [{"role": "user", "content": "Hello"}]),
        (
            {"input": "Hello", "instructions": "Be brief."},
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        ),
        (
            {
                "input": [
                    {"role": "developer", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "input_text", "text": "Hello"}], "type": "message"},
                    {
                        "id": "msg_1",
                        "role": "assistant",
                        "status": "completed",
                        "type": "message",
                        "content": [{"type": "output_text", "text": "Hi", "annotations": [], "logprobs": []}],
                    },
                    {"role": "user", "content": "Go on"},
                ]
            },
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "Go on"},
            ],
        ),
    ],
)
def test_the_text_is_the_generators(
    live: Live, generator: Generator, asked: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    expected = generator.generate(messages, max_new_tokens=24)
    found = live.ask(RESPONSES, **asked, **GREEDY)
    (item,) = found["output"]
    assert item["content"][0]["text"] == expected.text
    assert found["usage"]["input_tokens"] == expected.prompt_tokens
    assert found["usage"]["output_tokens"] == len(expected.tokens)
    assert found["status"] == "incomplete"
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["store"] is False


def test_an_answer_that_ends_by_itself_is_complete(live: Live) -> None:
    found = live.ask(RESPONSES, input="Hello", stop=["a", "e", "o", " "], temperature=1, seed=1)
    assert found["status"] == found["output"][0]["status"] == "completed"
    assert found["incomplete_details"] is None


def test_sampling_is_as_in_chats(live: Live, generator: Generator) -> None:
    expected = generator.generate("Hello", max_new_tokens=24, sampling=Sampling(temperature=0.8, top_p=0.9, seed=4))
    found = live.ask(RESPONSES, input="Hello", temperature=0.8, top_p=0.9, seed=4, max_output_tokens=24)
    assert found["output"][0]["content"][0]["text"] == expected.text
    assert (found["temperature"], found["top_p"]) == (0.8, 0.9)


def test_a_stream_tells_of_each_step_in_order(live: Live) -> None:
    events = live.events(RESPONSES, input="Hello", **GREEDY)
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 1
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(event["delta"] for event in events if "delta" in event)
    assert text == events[-4]["text"] == events[-1]["response"]["output"][0]["content"][0]["text"]
    whole = live.ask(RESPONSES, input="Hello", **GREEDY)
    assert text == whole["output"][0]["content"][0]["text"]
    assert events[-1]["response"]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


def test_log_probabilities_are_included_where_asked_for(live: Live) -> None:
    asked = {"input": "Hello", "include": ["message.output_text.logprobs"], "top_logprobs": 2, **GREEDY}
    whole = live.ask(RESPONSES, **asked)["output"][0]["content"][0]["logprobs"]
    assert len(whole) == 24
    assert {len(entry["top_logprobs"]) for entry in whole} == {2}
    streamed = [entry for event in live.events(RESPONSES, **asked) for entry in event.get("logprobs", [])]
    assert [entry["token"] for entry in streamed[:24]] == [entry["token"] for entry in whole]
    assert live.ask(RESPONSES, input="Hello", **GREEDY)["output"][0]["content"][0]["logprobs"] == []


def test_what_has_no_effect_is_told_as_it_was_given(live: Live) -> None:
    found = live.ask(RESPONSES, input="Hello", metadata={"a": "b"}, user="me", store=False, **GREEDY)
    assert (found["metadata"], found["user"]) == ({"a": "b"}, "me")
