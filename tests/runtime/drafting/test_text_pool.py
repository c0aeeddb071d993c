"""A pool of texts: what it holds, what is found in it, and what it drafts, whatever is put in meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.drafting.drafter import Drafter
from runtime.drafting.pool_drafts import FOLLOWED, LATEST, PoolDrafts
from runtime.drafting.sizing import FixedSizes
from runtime.drafting.source import Context
from runtime.drafting.text_drafts import TextDrafts
from runtime.drafting.text_pool import NOTHING, TextPool
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.errors import InputError
from runtime.tree import TreeSizes
from tests.runtime.drafting.paths import likeliest
from tests.runtime.known_engine import steps
from tests.runtime.test_decode import VOCAB, known_engine, plain

TEXT = list(range(100, 140))
TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=12)


def pool_of(*texts: Sequence[int], capacity: int = 1000) -> TextPool:
    pool = TextPool(capacity)
    for text in texts:
        pool.add(text)
    return pool


def test_an_answer_that_another_had_is_drafted() -> None:
    source = PoolDrafts(pool_of(TEXT))
    source.accept([7, 8, 9, *TEXT[:6]])
    assert likeliest(source.propose(Context(TEXT[5], 8, 12))) == TEXT[6:17]


def test_what_followed_in_different_answers_are_branches() -> None:
    source = PoolDrafts(pool_of([1, 2, 3, 4, 5], [1, 2, 3, 6, 7]))
    source.accept([1, 2, 3])
    tree = source.propose(Context(3, 2, 9))
    assert {int(tree.tokens[n]) for n in range(1, len(tree)) if tree.parents[n] == 0} == {4, 6}
    assert tree.child(tree.child(0, 6) or 0, 7) is not None


def test_one_token_in_common_is_too_little_to_be_looked_up() -> None:
    source = PoolDrafts(pool_of(TEXT))
    source.accept([1, TEXT[5]])
    assert len(source.propose(Context(TEXT[5], 1, 9))) == 1


def test_texts_do_not_run_into_each_other() -> None:
    source = PoolDrafts(pool_of([1, 2, 3], [4, 5, 6]))
    source.accept([9, 1, 2])
    assert likeliest(source.propose(Context(2, 2, 9))) == [3]
    source.accept([3])
    assert likeliest(source.propose(Context(3, 3, 9))) == []


def test_the_oldest_tokens_go_out() -> None:
    pool = pool_of(TEXT, [1, 2, 3], capacity=20)
    assert len(pool) == 20
    assert not list(pool.places(TEXT[5], TEXT[6]))
    assert [pool.at(place) for place in pool.places(TEXT[-4], TEXT[-3])] == [TEXT[-2]]
    assert [pool.at(place) for place in pool.places(1, 2)] == [3]


def test_a_text_that_is_written_over_while_it_is_followed_is_followed_no_more() -> None:
    pool = pool_of(TEXT, capacity=50)
    source = PoolDrafts(pool)
    source.accept([9, *TEXT[:5]])
    assert likeliest(source.propose(Context(TEXT[4], 5, 4))) == TEXT[5:8]
    pool.add([1] * 60)
    assert likeliest(source.propose(Context(TEXT[4], 5, 4))) == []
    source.accept([TEXT[5]])
    assert likeliest(source.propose(Context(TEXT[5], 6, 4))) == []


@settings(deadline=None)
@given(TEXTS, st.integers(1, 40))
def test_the_pool_is_the_last_tokens_and_finds_their_pairs(texts: list[list[int]], capacity: int) -> None:
    pool = TextPool(capacity)
    written: list[int] = []
    for text in texts:
        pool.add(text)
        if text and capacity > 1:
            written += [NOTHING, *text[-(capacity - 1) :]]
        held = written[-capacity:]
        assert [pool.at(place) for place in range(len(written) - len(held), len(written))] == held
        assert len(pool) == len(held)
        start = len(written) - len(held)
        for one in range(4):
            for other in range(4):
                expected = [
                    start + n + 2
                    for n in range(len(held) - 2)
                    if (held[n], held[n + 1]) == (one, other) and held[n + 2] != NOTHING
                ]
                assert list(pool.places(one, other)) == expected[::-1]
        # No more than there are pairs in what is held.
        assert len(pool._latest) <= max(0, len(held) - 1)


def test_memory_is_bounded_whatever_comes() -> None:
    pool = TextPool(1000)
    rng = np.random.default_rng(0)

    def size() -> int:
        return sum(map(sys.getsizeof, (pool._tokens, pool._earlier, pool._latest)))

    sizes = []
    for _ in range(200):
        pool.add(rng.integers(0, 1 << 30, 90).tolist())
        sizes.append(size())
    assert len(pool) == 1000
    # All pairs are different: the dictionary is as large as it ever gets.
    assert max(sizes) < 200 * 1000
    source = PoolDrafts(pool)
    for _ in range(50):
        pool.add([1, 2, 3, 4])
    for token in [1, 2, 3, 4] * 20:
        source.accept([token])
        assert len(source._matches) <= FOLLOWED
    assert LATEST <= FOLLOWED


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), max_size=4),
    st.integers(2, 60),
    st.lists(st.booleans(), min_size=1, max_size=7),
    st.integers(1, 12),
)
def test_any_pool_leaves_the_text_as_it_is(
    prompt: list[int], texts: list[list[int]], capacity: int, right: list[bool], rows: int
) -> None:
    expected = plain(prompt, 16)
    pool = pool_of(*texts, expected[2:12], capacity=capacity)
    sizes = FixedSizes(TreeSizes(rows, (rows, min(rows, 2), 0)))
    drafter = Drafter(sizes, [TransferDrafts(), TextDrafts(), PoolDrafts(pool)])
    found: list[int] = []
    for number, new in enumerate(steps(known_engine(right), prompt, drafter, max_new_tokens=16)):
        found += new
        # Others end meanwhile.
        pool.add(texts[number % len(texts)] if texts else found)
    assert found == expected


def test_what_a_pool_proposed_wrongly_is_trusted_less() -> None:
    source = PoolDrafts(pool_of([1, 2, 3]))
    source.accept([1, 2])
    before = float(source.propose(Context(2, 1, 2)).probabilities[1])
    for _ in range(5):
        source.accept([9, 1, 2])
    assert float(source.propose(Context(2, 1, 2)).probabilities[1]) < before


@pytest.mark.parametrize("capacity", [0, -1, 1 << 40, 1.5, True])
def test_a_size_that_no_pool_can_have(capacity: object) -> None:
    with pytest.raises(InputError, match="text_pool_tokens"):
        TextPool(capacity)  # type: ignore[arg-type]
