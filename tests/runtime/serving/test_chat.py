"""POST /v1/chat/completions: what a request asks for is what the generator is asked, and its text the answer's."""

from __future__ import annotations

from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

from runtime import Generator, Sampling
from tests.runtime.serving.live import CHAT, Live, held_up

GREEDY: Any = {"temperature": 0, "max_tokens": 24}


@pytest.mark.parametrize(
    ("asked", "sampling", "options"),
    [
        ({}, Sampling(), {}),
        ({"temperature": 0.7, "seed": 3}, Sampling(temperature=0.7, seed=3), {}),
        ({"temperature": None, "seed": 3}, Sampling(temperature=1.0, seed=3), {}),
        ({"temperature": 1, "seed": -1}, Sampling(temperature=1.0, seed=2**64 - 1), {}),
        ({"temperature": 1, "seed": 3, "top_p": 0.5}, Sampling(temperature=1.0, seed=3, top_p=0.5), {}),
        ({"temperature": 1, "seed": 3, "top_k": 5}, Sampling(temperature=1.0, seed=3, top_k=5), {}),
        ({"temperature": 1, "seed": 3, "top_k": -1}, Sampling(temperature=1.0, seed=3), {}),
        ({"temperature": 1, "seed": 3, "min_p": 0.1}, Sampling(temperature=1.0, seed=3, min_p=0.1), {}),
        ({"top_p": 0.5, "top_k": 2, "min_p": 0.5}, Sampling(), {}),
        ({"presence_penalty": 1.5}, Sampling(presence_penalty=1.5), {}),
        ({"frequency_penalty": -0.5}, Sampling(frequency_penalty=-0.5), {}),
        ({"repetition_penalty": 1.3}, Sampling(repetition_penalty=1.3), {}),
        ({"logit_bias": {"70": 40, "71": -3.5}}, Sampling(logit_bias={70: 40.0, 71: -3.5}), {}),
        ({"min_tokens": 20}, Sampling(min_new_tokens=20), {}),
        ({"speculate": False}, Sampling(), {"speculate": False}),
        ({"text_pool": False}, Sampling(), {"text_pool": False}),
        ({"prediction": {"type": "content", "content": "Hello there"}}, Sampling(), {"prediction": "Hello there"}),
        ({"prediction": {"type": "content", "content": ""}, "logprobs": True}, Sampling(), {}),
        ({"stop": "e"}, Sampling(), {"stop": ["e"]}),
        ({"stop": ["zz", "a"]}, Sampling(), {"stop": ["zz", "a"]}),
        ({"stop": []}, Sampling(), {}),
        ({"ignore_eos": True}, Sampling(), {"ignore_stop_tokens": True}),
        ({"max_tokens": None, "max_completion_tokens": 5}, Sampling(), {"max_new_tokens": 5}),
        ({"priority": 7, "user": "somebody", "metadata": {"a": "b"}, "store": False}, Sampling(), {"priority": 7}),
        ({"response_format": {"type": "text"}, "modalities": ["text"], "tools": [], "n": 1}, Sampling(), {}),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_the_text_is_the_generators(
    live: Live, generator: Generator, asked: dict[str, Any], sampling: Sampling, options: dict[str, Any], streamed: bool
) -> None:
    expected = generator.generate("Hello", **{"max_new_tokens": 24, "sampling": sampling, **options})
    if streamed:
        events = live.events(CHAT, messages=[{"role": "user", "content": "Hello"}], **{**GREEDY, **asked})
        text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
        finish = [event["choices"][0]["finish_reason"] for event in events]
        assert finish[:-1] == [None] * (len(events) - 1)
        assert (text, finish[-1]) == (expected.text, expected.finish_reason)
        return
    (choice,) = live.chat(**{**GREEDY, **asked})["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason


def test_usage_has_what_was_cached_and_what_was_drafted(live: Live, generator: Generator) -> None:
    content = "A prompt that is asked twice, and is long enough to be kept."
    live.chat(content, **GREEDY)
    expected = generator.generate(content, max_new_tokens=24)
    usage = live.chat(content, **GREEDY)["usage"]
    assert usage["prompt_tokens"] == expected.prompt_tokens
    assert usage["completion_tokens"] == len(expected.tokens)
    assert usage["total_tokens"] == expected.prompt_tokens + len(expected.tokens)
    assert usage["prompt_tokens_details"]["cached_tokens"] == expected.prompt_tokens - 1
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == expected.accepted_candidates
    assert details["rejected_prediction_tokens"] == expected.candidates - expected.accepted_candidates > 0
    plain = live.chat(content, speculate=False, **GREEDY)["usage"]["completion_tokens_details"]
    assert (plain["accepted_prediction_tokens"], plain["rejected_prediction_tokens"]) == (0, 0)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_prediction_is_accepted_as_far_as_it_is_in_the_answers(
    live: Live, generator: Generator, streamed: bool
) -> None:
    text = generator.generate("Hello", max_new_tokens=24).text
    parts = [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:] + " and more"}]
    asked = {**GREEDY, "n": 2, "prediction": {"type": "content", "content": parts}}
    if streamed:
        asked |= {"stream_options": {"include_usage": True}}
        events = live.events(CHAT, messages=[{"role": "user", "content": "Hello"}], **asked)
        answer = events[-1]
        texts = [
            "".join(e["choices"][0]["delta"].get("content") or "" for e in events[:-1] if e["choices"][0]["index"] == n)
            for n in range(2)
        ]
    else:
        answer = live.chat(**asked)
        texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [text, text]
    expected = generator.generate("Hello", max_new_tokens=24, prediction=text + " and more")
    assert 0 < expected.found_prediction_tokens < expected.prediction_tokens
    details = answer["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == 2 * expected.found_prediction_tokens
    assert sum(details.values()) == 2 * expected.prediction_tokens
    without = live.chat(**{**asked, "stream_options": None}, speculate=False)["usage"]["completion_tokens_details"]
    assert set(without.values()) == {0}


def test_an_answer_goes_on_to_the_context_limit_where_nothing_ends_it(live: Live, generator: Generator) -> None:
    answer = live.chat(temperature=0, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == generator.about.max_context


@pytest.mark.parametrize("streamed", [False, True])
def test_n_answers_are_those_of_the_seed_and_the_seeds_after_it(
    live: Live, generator: Generator, streamed: bool
) -> None:
    asked: dict[str, Any] = {"n": 3, "temperature": 1, "seed": 5, "max_tokens": 24}
    sampling = Sampling(temperature=1.0, seed=5)
    expected = [one.text for one in generator.generate("Hello", n=3, max_new_tokens=24, sampling=sampling)]
    if streamed:
        texts = ["", "", ""]
        messages = [{"role": "user", "content": "Hello"}]
        events = live.events(CHAT, messages=messages, stream_options={"include_usage": True}, **asked)
        usage = events.pop()["usage"]
        for event in events:
            assert event["usage"] is None
            (choice,) = event["choices"]
            texts[choice["index"]] += choice["delta"].get("content") or ""
    else:
        answer = live.chat(**asked)
        usage = answer["usage"]
        texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == expected
    assert len(set(texts)) == 3
    # A prompt counts once.
    assert usage["prompt_tokens"] == len(generator.encode("Hello"))
    assert usage["completion_tokens"] == 72


def test_a_stream_begins_with_the_role_and_may_end_with_the_usage(live: Live) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    events = live.events(CHAT, messages=messages, stream_options={"include_usage": True}, **GREEDY)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert events[-1]["choices"] == []
    whole = live.chat(**GREEDY)["usage"]
    counted = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [events[-1]["usage"][name] for name in counted] == [whole[name] for name in counted]
    without = live.events(CHAT, messages=messages, **GREEDY)
    assert all(event["choices"] and event["usage"] is None for event in without)


def test_a_stream_may_tell_its_usage_as_it_goes(live: Live) -> None:
    events = live.events(
        CHAT,
        messages=[{"role": "user", "content": "Hello"}],
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        **GREEDY,
    )
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == events[-1]["usage"]["total_tokens"] - events[0]["usage"]["prompt_tokens"] == 24


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("top", [None, 0, 2])
def test_log_probabilities_are_the_generators(
    live: Live, generator: Generator, streamed: bool, top: int | None
) -> None:
    scores = generator.generate("Hello", max_new_tokens=24, sampling=Sampling(logprobs=2)).log_probabilities
    assert scores is not None
    asked = {"logprobs": True, **({} if top is None else {"top_logprobs": top}), **GREEDY}
    if streamed:
        events = live.events(CHAT, messages=[{"role": "user", "content": "Hello"}], **asked)
        parts = [event["choices"][0]["logprobs"] for event in events]
        found = [entry for part in parts if part for entry in part["content"]]
    else:
        found = live.chat(**asked)["choices"][0]["logprobs"]["content"]
    assert len(found) == len(scores)
    for entry, score in zip(found, scores, strict=True):
        assert bytes(entry["bytes"]) == generator.token_bytes(score.token)
        assert entry["token"] == bytes(entry["bytes"]).decode(errors="replace")
        assert entry["logprob"] == pytest.approx(score.log_probability, abs=1e-5)
        for one, (token, value) in zip(entry["top_logprobs"], score.best[: top or 0], strict=True):
            assert bytes(one["bytes"]) == generator.token_bytes(token)
            assert one["logprob"] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi, you"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi, you"}]},
        ],
        [
            {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Hi, you", "name": "me"},
        ],
    ],
)
def test_messages_may_be_written_in_all_of_openais_ways(
    live: Live, generator: Generator, messages: list[dict[str, Any]]
) -> None:
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, you"}]
    found = live.ask(CHAT, messages=messages, **GREEDY)
    assert found["choices"][0]["message"]["content"] == generator.generate(plain, max_new_tokens=24).text


def test_an_answer_can_be_sent_back_as_it_came(live: Live) -> None:
    first = live.chat(**GREEDY)["choices"][0]["message"]
    more: dict[str, Any] = {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    messages = [{"role": "user", "content": "Hello"}, {**first, **more}, {"role": "user", "content": "Go on"}]
    assert live.ask(CHAT, messages=messages, **GREEDY)["choices"][0]["message"]["content"]


def test_text_of_messages_becomes_no_special_token(live: Live, generator: Generator) -> None:
    counted = live.chat("Hi</s>", **GREEDY)["usage"]["prompt_tokens"]
    assert counted == len(generator.encode("Hi</s>", escape_special_tokens=True))
    assert counted == len(generator.encode("Hi</s>")) + 3


def test_a_deadline_ends_an_answer_as_it_is_then(live: Live) -> None:
    answer = live.chat(temperature=0, ignore_eos=True, deadline=0.02)
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "deadline")
    assert answer["usage"]["completion_tokens"] < 200


@pytest.mark.parametrize("streamed", [False, True])
def test_a_deadline_that_passes_before_the_first_token_is_a_status(
    live: Live, generator: Generator, streamed: bool
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    body = {"model": live.name, "messages": [{"role": "user", "content": "a"}], "deadline": 0, "stream": streamed}
    with ThreadPoolExecutor(1) as pool:
        with held_up(generator):
            found = pool.submit(live.client.post, CHAT, json=body)
        answer = found.result()
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
