"""POST /v1/completions, and the log-likelihoods of prompts."""

from __future__ import annotations

from typing import Any

import pytest

for needed in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

from runtime import Generator, Sampling
from tests.runtime.serving.live import TEXT, Live

GREEDY: Any = {"temperature": 0, "max_tokens": 12}
PROMPT = "The sky is blue, and 漢字 are 🙂"


def text_of(generator: Generator, prompt: str, **options: Any) -> str:
    return generator.generate(prompt, **{"raw": True, "max_new_tokens": 12, **options}).text


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_the_text_is_the_generators(live: Live, generator: Generator, streamed: bool, echo: bool) -> None:
    expected = (PROMPT if echo else "") + text_of(generator, PROMPT)
    if streamed:
        events = live.events(TEXT, prompt=PROMPT, echo=echo, **GREEDY)
        assert "".join(event["choices"][0]["text"] for event in events) == expected
        assert events[-1]["choices"][0]["finish_reason"] == "length"
    else:
        answer = live.ask(TEXT, prompt=PROMPT, echo=echo, **GREEDY)
        assert answer["choices"][0]["text"] == expected
        assert answer["object"] == "text_completion"


def test_sixteen_tokens_where_nothing_is_said(live: Live) -> None:
    assert live.ask(TEXT, prompt=PROMPT, temperature=0, ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_prompts_may_be_tokens(live: Live, generator: Generator) -> None:
    tokens = generator.encode(PROMPT, raw=True)
    answer = live.ask(TEXT, prompt=tokens, echo=True, **GREEDY)
    assert answer["choices"][0]["text"] == PROMPT + text_of(generator, PROMPT)
    assert answer["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize("streamed", [False, True])
def test_several_prompts_have_n_answers_each_in_order(live: Live, generator: Generator, streamed: bool) -> None:
    prompts = ["One, two,", "a", "Why"]
    sampling = Sampling(temperature=1.0, seed=9)
    found = generator.generate(prompts, n=2, raw=True, max_new_tokens=12, sampling=sampling)
    expected = [one.text for each in found for one in each]
    asked = {"prompt": prompts, "n": 2, "temperature": 1, "seed": 9, "max_tokens": 12}
    if streamed:
        texts = [""] * 6
        for event in live.events(TEXT, **asked):
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    else:
        answer = live.ask(TEXT, **asked)
        texts = [choice["text"] for choice in answer["choices"]]
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        assert answer["usage"]["prompt_tokens"] == sum(len(generator.encode(one, raw=True)) for one in prompts)
    assert texts == expected


def test_special_tokens_in_a_prompt_are_the_callers_own(live: Live, generator: Generator) -> None:
    found = live.ask(TEXT, prompt="Hi</s>", **GREEDY)["usage"]["prompt_tokens"]
    assert found == len(generator.encode("Hi</s>", raw=True)) == 3


@pytest.mark.parametrize("count", [0, 1, 3])
def test_echo_with_logprobs_scores_the_prompt(live: Live, generator: Generator, count: int) -> None:
    answer = live.ask(TEXT, prompt=PROMPT, echo=True, logprobs=count, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == PROMPT
    assert answer["usage"]["completion_tokens"] == 0
    scored = generator.generate(PROMPT, raw=True, max_new_tokens=0, prompt_logprobs=3).prompt_log_probabilities
    assert scored is not None
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [
        generator.token_bytes(token).decode(errors="replace") for token in generator.encode(PROMPT, raw=True)
    ]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    for value, score in zip(logprobs["token_logprobs"][1:], scored[1:], strict=True):
        assert score is not None
        assert value == pytest.approx(score.log_probability, abs=1e-4)
    for best, score, value in zip(
        logprobs["top_logprobs"][1:], scored[1:], logprobs["token_logprobs"][1:], strict=True
    ):
        if not count:
            assert best is None
            continue
        assert score is not None
        assert max(best.values()) == pytest.approx(score.best[0][1], abs=1e-4)
        # As lm-eval tells whether a token is the greedy one.
        assert (value == max(best.values())) == (score.token == score.best[0][0])


def test_places_in_the_text_are_in_characters(live: Live) -> None:
    logprobs = live.ask(TEXT, prompt=PROMPT, echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]
    places = logprobs["text_offset"]
    assert places == sorted(places)
    for token, place in zip(logprobs["tokens"], places, strict=True):
        if "\ufffd" not in token:
            assert PROMPT[place : place + len(token)] == token


def test_echo_goes_on_with_the_answers_own_tokens(live: Live, generator: Generator) -> None:
    (choice,) = live.ask(TEXT, prompt=PROMPT, echo=True, logprobs=1, **GREEDY)["choices"]
    assert choice["text"] == PROMPT + text_of(generator, PROMPT)
    assert len(choice["logprobs"]["tokens"]) == len(generator.encode(PROMPT, raw=True)) + 12


def test_streamed_log_probabilities_are_those_of_the_whole(live: Live) -> None:
    whole = live.ask(TEXT, prompt=PROMPT, logprobs=2, **GREEDY)["choices"][0]["logprobs"]
    parts = [event["choices"][0]["logprobs"] for event in live.events(TEXT, prompt=PROMPT, logprobs=2, **GREEDY)]
    for name in ("tokens", "text_offset"):
        assert [one for part in parts if part for one in part[name]] == whole[name]


def test_many_prompts_are_scored_in_one_request(live: Live) -> None:
    prompts = [PROMPT, "One, two", PROMPT[5:]]
    together = live.ask(TEXT, prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)["choices"]
    for prompt, choice in zip(prompts, together, strict=True):
        (alone,) = live.ask(TEXT, prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0)["choices"]
        assert choice["text"] == alone["text"]
        found, expected = (one["logprobs"]["token_logprobs"][1:] for one in (choice, alone))
        assert found == pytest.approx(expected, abs=1e-4)
