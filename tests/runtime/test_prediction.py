"""`generate(prediction=...)`: the same text in fewer passes, whatever is predicted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from runtime import Generator, InputError, Sampling, Tokens, TreeSizes
from runtime.preparation import MOST_COPIED

PROMPTS = ["Hello", "x" * 40, "The sky is blue, the sky is", "a", "Why?", "Ünïcödé"]
NEW = 60
SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=11)
WIDE = TreeSizes(24, (2, 2, 2))


@pytest.fixture(scope="module")
def generator(tiny_engine: Path) -> Iterator[Generator]:
    with Generator(tiny_engine, threads=1) as generator:
        yield generator


@pytest.fixture(scope="module")
def alone(generator: Generator) -> list[list[int]]:
    """The tokens of each prompt, plain and one after another."""
    return [generator.generate(prompt, max_new_tokens=NEW, speculate=False).tokens for prompt in PROMPTS]


def edited(tokens: Sequence[int]) -> Tokens:
    """Return what differs from `tokens` here and there: replaced, put in, left out and moved."""
    return Tokens([*tokens[:10], 70, *tokens[11:25], 71, 72, *tokens[25:33], *tokens[36:50], *tokens[33:36]])


@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("way", [{}, {"tree": WIDE}, {"ngrams": False}, {"tree": TreeSizes(2, (0, 0, 0))}])
def test_any_prediction_leaves_the_text_as_it_is(
    generator: Generator, sampling: Sampling | None, way: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {"max_new_tokens": NEW, "sampling": sampling}
    expected = generator.generate("Hello", speculate=False, **asked)
    predictions = (
        Tokens(expected.tokens),
        edited(expected.tokens),
        edited(expected.tokens[::-1]),
        expected.text,
        "something else altogether",
        "",
        Tokens([0] * 256),
    )
    for prediction in predictions:
        found = generator.generate("Hello", prediction=prediction, **asked, **way)
        assert (found.text, found.tokens) == (expected.text, expected.tokens)


def test_a_right_prediction_is_an_answer_in_few_passes(generator: Generator, alone: list[list[int]]) -> None:
    right = Tokens(alone[0])
    without = generator.generate("Hello", max_new_tokens=NEW, tree=WIDE)
    found = generator.generate("Hello", max_new_tokens=NEW, tree=WIDE, prediction=right)
    # 24 tokens a pass, after the first one.
    assert found.steps <= 5 < without.steps
    assert (found.prediction_tokens, found.found_prediction_tokens) == (NEW, NEW)
    assert (without.prediction_tokens, without.found_prediction_tokens) == (0, 0)
    changed = generator.generate("Hello", max_new_tokens=NEW, tree=WIDE, prediction=edited(alone[0]))
    assert changed.steps < without.steps / 2
    assert NEW / 2 < changed.found_prediction_tokens < changed.prediction_tokens == len(edited(alone[0]))


def test_paths_may_be_longer_than_what_was_measured(generator: Generator, alone: list[list[int]]) -> None:
    assert generator.tuning is not None
    measured = max(size.tree_rows for size in generator.tuning.menu.sizes)

    def most(**options: Any) -> int:
        job, _ = generator._preparation.prepare("Hello", max_new_tokens=NEW, **options)
        return job.state.drafter.sizing.most_rows

    right = Tokens(alone[0])
    assert most(prediction=right) > most() == MOST_COPIED > measured
    assert most(prediction=right, ngrams=False) == most(prediction=right)
    assert most(ngrams=False) == measured
    assert most(speculate=False, prediction=right) == 1


def test_plain_decoding_takes_no_notice_of_it(generator: Generator, alone: list[list[int]]) -> None:
    found = generator.generate("Hello", max_new_tokens=NEW, speculate=False, prediction=Tokens(alone[0]))
    assert (found.tokens, found.steps, found.prediction_tokens) == (alone[0], NEW, 0)


@pytest.mark.parametrize("way", [{}, {"tree": WIDE}])
def test_several_prompts_have_one_prediction_each_or_one_for_all(
    generator: Generator, alone: list[list[int]], way: dict[str, Any]
) -> None:
    each = [None, *(edited(tokens) for tokens in alone[1:4]), "", "Why?"]
    for prediction in (each, edited(alone[2]), [None] * len(PROMPTS)):
        found = generator.generate(PROMPTS, max_new_tokens=NEW, prediction=prediction, **way)
        assert [one.tokens for one in found] == alone
    found = generator.generate(PROMPTS, max_new_tokens=NEW, prediction=[Tokens(one) for one in alone], **way)
    assert [one.found_prediction_tokens for one in found] == [len(tokens) for tokens in alone]
    (answers,) = generator.generate(PROMPTS[:1], n=2, max_new_tokens=NEW, prediction=[Tokens(alone[0])], **way)
    assert [one.tokens for one in answers] == [alone[0]] * 2


def test_requests_that_make_room_for_each_other_keep_their_predictions(
    tiny_engine: Path, generator: Generator, alone: list[list[int]]
) -> None:
    row = generator.engine.row_bytes
    with Generator(tiny_engine, threads=1, cache_bytes=row * 200, prefix_cache_bytes=0) as small:
        # On a busy machine requests may arrive one after the other, and leave each other room.
        for _ in range(10):
            found = small.generate(PROMPTS, max_new_tokens=NEW, prediction=[edited(tokens) for tokens in alone])
            assert [one.tokens for one in found] == alone
            if small.metrics()["preemptions"]:
                break
        assert small.metrics()["preemptions"] > 0


def test_what_is_expected_of_an_answer_takes_none_of_its_room(tiny_engine: Path, generator: Generator) -> None:
    row = generator.engine.row_bytes
    with Generator(tiny_engine, threads=1, cache_bytes=row * 140, prefix_cache_bytes=0) as small:
        for most in (None, 60):
            without = small.generate("Hello", max_new_tokens=most)
            found = small.generate("Hello", max_new_tokens=most, prediction=Tokens(without.tokens))
            assert found.tokens == without.tokens


def test_an_answer_goes_on_to_the_context_limit_as_predicted(generator: Generator) -> None:
    asked: dict[str, Any] = {"max_new_tokens": None, "ignore_stop_tokens": True}
    expected = generator.generate("Hello", speculate=False, **asked)
    assert expected.prompt_tokens + len(expected.tokens) == generator.about.max_context
    ways: list[dict[str, Any]] = [{}, {"tree": WIDE}]
    for way in ways:
        found = generator.generate("Hello", prediction=Tokens([*expected.tokens, 5, 6]), **asked, **way)
        assert (found.tokens, found.finish_reason) == (expected.tokens, "length")
        assert found.found_prediction_tokens == len(expected.tokens)


def test_streams_and_tasks_take_it_too(generator: Generator, alone: list[list[int]]) -> None:
    asked: dict[str, Any] = {"max_new_tokens": NEW, "prediction": Tokens(alone[0])}

    async def task() -> list[int]:
        chunks = [chunk async for chunk in generator.astream("Hello", **asked)]
        assert chunks[-1].result is not None
        assert chunks[-1].result.found_prediction_tokens == NEW
        return (await generator.agenerate("Hello", **asked)).tokens

    assert [token for chunk in generator.stream("Hello", **asked) for token in chunk.tokens] == alone[0]
    assert asyncio.run(task()) == alone[0]


@pytest.mark.parametrize(
    ("prediction", "told"),
    [
        (5, "prediction must be a string or runtime.Tokens, not 5"),
        (b"a", "prediction must be a string or runtime.Tokens"),
        (["a"], "a list of predictions is for generate"),
        ([1, 2], "a list of predictions is for generate"),
        (Tokens([1, 264]), "each token of a prediction must be at most 263, not 264"),
        (Tokens([1.5]), "each token of a prediction must be a whole number"),  # type: ignore[list-item]
        (Tokens([1] * 257), "the prediction has more than 256 tokens, the engine's context limit"),
        ("a" * 257, "the prediction has more than 256 tokens, the engine's context limit"),
        ("a" * (1 << 21), "the prediction has more than 256 tokens, the engine's context limit"),
        ("\ud800", "the prediction has .* which is no character"),
    ],
)
@pytest.mark.parametrize("speculate", [True, False])
def test_what_is_no_prediction_is_one_error(generator: Generator, prediction: Any, told: str, speculate: bool) -> None:
    with pytest.raises(InputError, match=told):
        generator.check("Hello", prediction=prediction, speculate=speculate)
    with pytest.raises(InputError, match=told):
        generator.generate("Hello", prediction=prediction, speculate=speculate)


def test_predictions_are_as_many_as_prompts(generator: Generator) -> None:
    with pytest.raises(InputError, match="there are 1 predictions for 2 prompts; give one for each"):
        generator.generate(["a", "b"], prediction=["a"])
    with pytest.raises(InputError, match=r"prediction must be a string or runtime.Tokens, not 7"):
        generator.generate(["a", "b"], prediction=["a", 7])  # type: ignore[list-item]
