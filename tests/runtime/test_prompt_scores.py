"""How likely the base model finds a prompt, and counts of what drafts came to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ht_export.model.checkpoint import load_base_model
from runtime import GenerationResult, Generator, InputError, Sampling, Tokens, TreeSizes
from runtime.scheduling.prefixes import SHORTEST

WIDE = TreeSizes(150, (150, 150, 150))
# Longer than a chunk of the prompt, and than the shortest prefix that is kept.
PROMPT = "The sky is blue, the sky is grey, and the sea is deep."


@pytest.fixture(scope="module")
def generator(tiny_engine: Path) -> Iterator[Generator]:
    with Generator(tiny_engine, threads=1, adapt=False) as generator:
        yield generator


def scores(result: GenerationResult) -> list[float]:
    assert result.prompt_log_probabilities is not None
    return [one.log_probability for one in result.prompt_log_probabilities if one is not None]


def test_the_scores_of_a_prompt_are_those_of_the_base_model(generator: Generator, tiny_checkpoint: Path) -> None:
    result = generator.generate(PROMPT, max_new_tokens=0, prompt_logprobs=3)
    assert (result.text, result.tokens, result.finish_reason, result.steps) == ("", [], "length", 0)
    ids = generator.encode(PROMPT)
    expected = load_base_model(str(tiny_checkpoint)).model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    found = result.prompt_log_probabilities
    assert found is not None
    assert len(found) == len(ids) == result.prompt_tokens
    assert found[0] is None
    for token, one, row in zip(ids[1:], found[1:], expected[:-1], strict=True):
        assert one is not None
        assert one.token == token
        assert one.log_probability == pytest.approx(float(row[token]), abs=1e-4)
        assert [place for place, _ in one.best] == row.topk(3).indices.tolist()


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, seed=4), Sampling(logprobs=2)])
@pytest.mark.parametrize("speculate", [True, False])
def test_an_answer_is_the_same_whether_its_prompt_is_scored(
    generator: Generator, sampling: Sampling | None, speculate: bool
) -> None:
    scored = generator.generate(PROMPT, max_new_tokens=20, sampling=sampling, prompt_logprobs=1, speculate=speculate)
    other = generator.generate(PROMPT, max_new_tokens=20, sampling=sampling)
    assert scored.tokens == other.tokens
    assert other.prompt_log_probabilities is None


def test_a_scored_prompt_takes_no_rows_of_others_and_leaves_its_own(generator: Generator) -> None:
    first = generator.generate(PROMPT, max_new_tokens=4)
    scored = generator.generate(PROMPT, max_new_tokens=0, prompt_logprobs=1)
    assert first.prompt_tokens > SHORTEST
    assert scored.cached_prompt_tokens == 0
    assert generator.generate(PROMPT, max_new_tokens=4).cached_prompt_tokens == first.prompt_tokens - 1


def test_many_prompts_are_scored_at_once_beside_others(generator: Generator) -> None:
    prompts = [PROMPT[start:] for start in range(8)]
    alone = [scores(generator.generate(prompt, max_new_tokens=0, prompt_logprobs=2)) for prompt in prompts]
    other = generator.submit("Why?", max_new_tokens=40, ignore_stop_tokens=True)
    requests = [generator.submit(prompt, max_new_tokens=0, prompt_logprobs=2) for prompt in prompts]
    for request, expected in zip(requests, alone, strict=True):
        assert scores(request.result()) == pytest.approx(expected, abs=1e-4)
    assert len(other.result().tokens) == 40


def test_a_prompt_of_one_token_has_nothing_to_score(generator: Generator) -> None:
    result = generator.generate(Tokens([5]), max_new_tokens=0, prompt_logprobs=1)
    assert result.prompt_log_probabilities == [None]


def test_no_answer_is_for_scored_prompts_alone(generator: Generator) -> None:
    with pytest.raises(InputError, match="max_new_tokens must be at least 1, not 0"):
        generator.generate(PROMPT, max_new_tokens=0)
    with pytest.raises(InputError, match="prompt_logprobs must be at least 1, not 0"):
        generator.generate(PROMPT, prompt_logprobs=0)


def test_as_many_tokens_as_there_is_room_for(generator: Generator, tiny_engine: Path) -> None:
    result = generator.generate(PROMPT, max_new_tokens=None, ignore_stop_tokens=True)
    assert result.finish_reason == "length"
    assert result.prompt_tokens + len(result.tokens) == generator.about.max_context
    row = generator.engine.row_bytes
    with Generator(tiny_engine, threads=1, adapt=False, cache_bytes=120 * row, prefix_cache_bytes=0) as small:
        fewer = small.generate(PROMPT, max_new_tokens=None, ignore_stop_tokens=True)
        assert 0 < len(fewer.tokens) < len(result.tokens)
        assert fewer.tokens == result.tokens[: len(fewer.tokens)]


def test_an_answer_may_go_on_after_the_models_end(generator: Generator) -> None:
    stop = generator.about.stop_tokens[0]
    forced = Sampling(forced_tokens={3: stop})
    assert len(generator.generate("Hi", max_new_tokens=9, sampling=forced).tokens) == 4
    on = generator.generate("Hi", max_new_tokens=9, sampling=forced, ignore_stop_tokens=True)
    assert len(on.tokens) == 9
    assert on.tokens[3] == stop


def test_candidates_are_counted_with_those_accepted(generator: Generator) -> None:
    before = generator.metrics()
    result = generator.generate("Stop here", max_new_tokens=33, tree=WIDE)
    after = generator.metrics()
    assert result.accepted_candidates > 0
    assert len(result.tokens) == result.steps + result.accepted_candidates
    assert result.candidates == after["candidates"] - before["candidates"] >= result.accepted_candidates
    assert sum(after["accepted_at"]) - sum(before["accepted_at"]) == result.accepted_candidates
    assert after["accepted_at"] == sorted(after["accepted_at"], reverse=True)
    assert after["drafts"] - before["drafts"] == result.steps - 1
    assert after["chosen_tokens"] - before["chosen_tokens"] == 33
    assert sum(after["token_seconds"]["counts"]) - sum(before["token_seconds"]["counts"]) == 32
    plain = generator.generate("Stop here", max_new_tokens=9, speculate=False)
    assert (plain.candidates, plain.accepted_candidates) == (0, 0)


def test_the_bytes_of_tokens_make_up_the_text(generator: Generator) -> None:
    text = "Ünïcödé 漢字 🙂 is text"
    tokens = generator.encode(text, raw=True)
    assert b"".join(map(generator.token_bytes, tokens)).decode() == text
    assert generator.token_bytes(2) == b"</s>"
    with pytest.raises(InputError, match="token must be at most 263"):
        generator.token_bytes(264)
