"""`Generator(text_pool_tokens=N)`: the same texts, in fewer passes where others had them, from many threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runtime import CancelledError, Generator, InputError, Sampling, TreeSizes
from runtime.drafting.text_pool import TextPool

PROMPTS = ["Hello", "x" * 40, "The sky is blue, the sky is", "a", "Why?", "Ünïcödé"]
NEW = 40
WIDE = TreeSizes(16, (2, 2, 2))
SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=11)


@pytest.fixture
def generator(tiny_engine: Path) -> Iterator[Generator]:
    """A generator whose pool is empty."""
    with Generator(tiny_engine, threads=1, text_pool_tokens=500) as generator:
        yield generator


def held(generator: Generator) -> int:
    pool = generator._preparation._text_pool
    assert isinstance(pool, TextPool)
    return len(pool)


@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("way", [{}, {"tree": WIDE}, {"ngrams": False, "tree": WIDE}])
def test_texts_are_those_without_a_pool(
    generator: Generator, tiny_engine: Path, sampling: Sampling | None, way: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {"max_new_tokens": NEW, "sampling": sampling, **way}
    with Generator(tiny_engine, threads=1) as without:
        expected = [without.generate(prompt, **asked).tokens for prompt in PROMPTS]
    for _ in range(2):
        assert [generator.generate(prompt, **asked).tokens for prompt in PROMPTS] == expected
        assert [one.tokens for one in generator.generate(PROMPTS, **asked)] == expected


def test_an_answer_that_another_had_comes_in_few_passes(generator: Generator) -> None:
    asked: dict[str, Any] = {"max_new_tokens": NEW, "tree": WIDE, "ngrams": False}
    first, second = (generator.generate("Hello", **asked) for _ in range(2))
    assert first.tokens == second.tokens
    assert second.steps < first.steps / 2


def test_a_request_may_take_nothing_and_leave_nothing(generator: Generator) -> None:
    asked: dict[str, Any] = {"max_new_tokens": NEW, "tree": WIDE, "ngrams": False}
    first = generator.generate("Hello", **asked, text_pool=False)
    assert held(generator) == 0
    generator.generate("Hello", **asked)
    assert held(generator) == NEW + 1
    assert generator.generate("Hello", **asked, text_pool=False).steps == first.steps
    assert held(generator) == NEW + 1


def test_what_is_decoded_plainly_is_kept_too(generator: Generator) -> None:
    plain = generator.generate("Hello", max_new_tokens=NEW, speculate=False)
    assert plain.steps == NEW
    assert held(generator) == NEW + 1


def test_only_whole_answers_are_kept(generator: Generator) -> None:
    request = generator.stream("Hello", max_new_tokens=NEW)
    next(request)
    request.cancel()
    with pytest.raises(CancelledError):
        request.result()
    with contextlib.suppress(Exception):
        generator.generate("Hello", max_new_tokens=NEW, deadline_s=0.001)
    generator.warm_up()
    assert held(generator) == 0


def test_the_pool_is_never_larger_than_it_may_be(generator: Generator) -> None:
    for number in range(20):
        generator.generate(f"Number {number}", max_new_tokens=NEW)
        assert held(generator) <= 500
    assert held(generator) == 500


def test_a_trace_says_what_came_from_the_pool(generator: Generator) -> None:
    asked: dict[str, Any] = {"max_new_tokens": NEW, "tree": WIDE, "ngrams": False, "trace": True}

    def sources(**options: Any) -> set[str]:
        passes = generator.generate("Hello", **asked, **options).passes or ()
        return {source for one in passes for node in one.nodes for source in node.sources}

    assert "pool" not in sources()
    assert "pool" in sources()
    assert "pool" not in sources(text_pool=False)


def test_many_threads_share_a_pool(generator: Generator, tiny_engine: Path) -> None:
    with Generator(tiny_engine, threads=1) as without:
        expected = {prompt: without.generate(prompt, max_new_tokens=NEW).tokens for prompt in PROMPTS}
    with ThreadPoolExecutor(6) as threads:
        found = threads.map(lambda one: (one, generator.generate(one, max_new_tokens=NEW).tokens), PROMPTS * 4)
        assert all(tokens == expected[prompt] for prompt, tokens in found)


def test_without_being_asked_for_there_is_none(tiny_engine: Path) -> None:
    with Generator(tiny_engine, threads=1) as generator:
        assert generator._preparation._text_pool is None
        generator.generate("Hello", max_new_tokens=4, text_pool=True)


def test_a_size_that_no_pool_can_have(tiny_engine: Path) -> None:
    with pytest.raises(InputError, match="text_pool_tokens must be at least 0, not -1"):
        Generator(tiny_engine, text_pool_tokens=-1)
