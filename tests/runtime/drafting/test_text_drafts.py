"""Text as a draft source: what it proposes where an answer copies, and where it parts from what it was copying."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.drafting.drafter import Drafter
from runtime.drafting.drafts import DraftStep
from runtime.drafting.sizing import FixedSizes
from runtime.drafting.source import Context, DraftSource
from runtime.drafting.text_drafts import AFTER, BEFORE, LATEST, TextDrafts, Where
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.tree import Tree, TreeSizes
from tests.runtime.drafting.paths import likeliest
from tests.runtime.known_engine import steps
from tests.runtime.test_decode import VOCAB, known_engine, plain

# Words that come once each, so that there is one place for each.
WORDS = list(range(100, 200))


def proposed(source: TextDrafts, answer: Sequence[int], rows: int = 9) -> Tree:
    """Return what `source` proposes after `answer`, token by token."""
    tree = Tree.first(source.propose(Context(answer[0], 0, rows)), 1)
    for token in answer:
        source.accept([token])
        tree = source.propose(Context(token, 0, rows))
    return tree


def passes(prediction: Sequence[int], answer: Sequence[int], rows: int = 32) -> int:
    """Return the passes that `answer` takes where nothing else is drafted from."""
    source = TextDrafts(prediction)
    source.accept(answer[:1])
    done, count = 1, 1
    while done < len(answer):
        tree = source.propose(Context(answer[done - 1], 0, rows))
        node, start = 0, done
        while done < len(answer):
            child = tree.child(node, answer[done])
            done += 1
            if child is None:
                break
            node = child
        source.accept(answer[start:done])
        count += 1
    return count


def test_an_answer_that_begins_as_it_was_predicted_goes_on_so() -> None:
    assert likeliest(proposed(TextDrafts(WORDS), WORDS[:1])) == WORDS[1:9]
    assert likeliest(proposed(TextDrafts(WORDS), WORDS[:20])) == WORDS[20:28]


def test_the_tokens_of_the_prompt_are_no_part_of_the_answer() -> None:
    source = TextDrafts(WORDS)
    source.accept([WORDS[50], WORDS[51], WORDS[52], WORDS[0]])
    assert likeliest(source.propose(Context(WORDS[0], 3, 4))) == WORDS[1:4]


@pytest.mark.parametrize(
    ("answer", "follows"),
    [
        ([*WORDS[:20], 7], 21),
        ([*WORDS[:20], 7, WORDS[21]], 22),
        ([*WORDS[:20], 7, 8, WORDS[20]], 21),
        ([*WORDS[:20], WORDS[25]], 26),
        ([*WORDS[:20], *WORDS[60:63]], 63),
        ([*WORDS[40:60], *WORDS[:3]], 3),
    ],
    ids=["replaced", "after a replacement", "put in", "left out", "moved here", "moved there"],
)
def test_where_an_answer_parts_from_it_the_prediction_is_found_again(answer: list[int], follows: int) -> None:
    tree = proposed(TextDrafts(WORDS), answer)
    assert WORDS[follows] in tree.tokens[tree.depths == 1]
    assert likeliest(tree)[:2] == WORDS[follows : follows + 2]


def test_a_change_costs_few_passes() -> None:
    answer = [*WORDS[:30], 7, *WORDS[31:60], 8, 9, *WORDS[60:80], *WORDS[85:]]
    assert passes(WORDS, WORDS) == 5
    assert passes(WORDS, answer) <= 5 + 3 * 2


def test_places_that_are_as_likely_are_branches() -> None:
    prediction = [1, 2, 3, 4, 50, 51, 1, 2, 3, 4, 60, 61, 1, 2, 3, 4, 70, 71, 1, 2, 3, 4, 80, 81]
    tree = proposed(TextDrafts(prediction), [9, 9, 9, 9, 9, 9, 1, 2, 3, 4], rows=64)
    assert set(tree.tokens[tree.depths == 1].tolist()) == {50, 60, 70, 80}


def test_after_its_end_the_answers_end_is_proposed() -> None:
    tree = proposed(TextDrafts(WORDS, ends=(2, 3)), WORDS[:97], rows=32)
    assert tree.tokens.tolist() == [WORDS[96], *WORDS[97:], 2, 3]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 3]
    assert proposed(TextDrafts(WORDS, ends=(2,)), WORDS, rows=32).tokens.tolist() == [WORDS[-1], 2]


def test_a_sure_path_is_as_long_as_trees_may_be() -> None:
    words = list(range(1000))
    tree = proposed(TextDrafts(words), words[:500], rows=64)
    assert tree.tokens.tolist() == words[499:563]
    assert tree.probabilities[-1] > 0.8


def test_an_answer_that_is_nothing_like_it_is_left_alone() -> None:
    answer = [5, 6, 7, 8, 9] * 20
    assert len(proposed(TextDrafts(WORDS, itself=False), answer)) == 1
    # Single words in common are soon not believed.
    answer = [token for word in WORDS[:40] for token in (5, word, 6)]
    assert proposed(TextDrafts(WORDS[::-1]), [*answer, WORDS[70]]).probabilities[1:].sum() < 0.2


def test_no_prediction_proposes_nothing() -> None:
    assert len(proposed(TextDrafts([]), [1, 2, 3])) == 1
    assert len(TextDrafts(WORDS).propose(Context(5, 0, 9))) == 1


def test_trust_grows_with_the_match_and_is_learned() -> None:
    source = TextDrafts()
    for where in Where:
        assert all(source.trust(where, few) <= source.trust(where, few + 1) for few in range(40))
    assert source.trust(Where.EXPECTED, 3) > source.trust(Where.NEAR, 3) > source.trust(Where.FAR, 3)
    # Pairs that come again, each followed by something else every time.
    text = [token for number in range(40) for token in (5, 6, 100 + number)]
    source.accept(text[:30])
    before = [source.trust(Where.FAR, 2), source.trust(Where.NEAR, 2)]
    source.accept([5, 6])
    source.accept(text[32:])
    assert source.trust(Where.FAR, 2) + source.trust(Where.NEAR, 2) < sum(before)
    repeating = TextDrafts()
    repeating.accept(WORDS[:5])
    repeating.accept(WORDS[:5] * 60)
    assert max(repeating.trust(where, 99) for where in Where) > max(source.trust(where, 99) for where in Where)


def test_nobody_guesses_the_tokens_of_the_prompt() -> None:
    source = TextDrafts()
    source.accept([5, 6, 7] * 30)
    assert all(
        source.trust(where, matched) == TextDrafts().trust(where, matched) for where in Where for matched in (1, 9)
    )


def test_a_text_that_repeats_one_token_goes_on_with_it() -> None:
    source = TextDrafts()
    source.accept([3] * 20)
    tree = source.propose(Context(3, 19, 30))
    # Beyond its own end too.
    assert tree.tokens.tolist() == [3] * 30
    assert tree.depths.tolist() == list(range(30))


def test_a_loop_is_drafted_beyond_the_texts_end() -> None:
    source = TextDrafts()
    source.accept([*WORDS[:4] * 3, WORDS[0]])
    assert likeliest(source.propose(Context(WORDS[0], 12, 20)))[:9] == [*WORDS[1:4], *WORDS[:4], *WORDS[:2]]


def test_a_text_that_repeats_nothing_has_no_continuation() -> None:
    source = TextDrafts()
    assert source.propose(Context(0, 0, 9)).tokens.tolist() == [0]
    source.accept(list(range(30)))
    assert source.propose(Context(29, 29, 9)).tokens.tolist() == [29]


def test_what_followed_more_often_and_lately_is_likelier() -> None:
    source = TextDrafts()
    source.accept([1, 2, 50, 9, 1, 2, 60, 8, 1, 2, 60, 7, 1, 2])
    tree = source.propose(Context(2, 13, 30))
    first = dict(
        zip(tree.tokens[tree.depths == 1].tolist(), tree.probabilities[tree.depths == 1].tolist(), strict=True)
    )
    assert first[60] > first[50] > 0


def test_without_the_text_itself_nothing_but_the_prediction_is_proposed() -> None:
    source = TextDrafts(WORDS, itself=False)
    source.accept([*[5, 6, 7] * 5, 5])
    source.accept([6, 7, 5, 6])
    assert 7 not in source.propose(Context(6, 20, 30)).tokens


def test_nodes_that_are_not_worth_their_time_are_not_proposed() -> None:
    source = TextDrafts()
    source.accept([1, 2, 50, 9, 1, 2, 60, 8, 1, 2, 70, 7, 1, 2])
    full = source.propose(Context(2, 13, 30))
    for least in (0.1, 0.3, 0.9):
        cut = source.propose(Context(2, 13, 30, least=least))
        assert len(cut) == int((full.probabilities >= least).sum())


@given(
    st.lists(st.integers(0, 3), max_size=20),
    st.lists(st.integers(0, 3), max_size=40),
    st.lists(st.integers(0, 3), max_size=40),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
def test_a_proposal_is_a_tree_of_probabilities(
    prediction: list[int], prompt: list[int], answer: list[int], rows: int, itself: bool, drafted: bool
) -> None:
    source = TextDrafts(prediction, ends=(0, 9), itself=itself)
    source.accept([*prompt, 1])
    drafts = [DraftStep(np.array([1]), np.array([0.5]))] if drafted else []
    for token in answer:
        source.accept([token])
        tree = source.propose(Context(token, 5, rows, drafts))
        assert len(tree) <= rows
        assert tree.tokens[0] == token
        assert (tree.tokens >= 0).all()
        assert (tree.parents[1:] < np.arange(1, len(tree))).all()
        assert (tree.depths[1:] == tree.depths[tree.parents[1:]] + 1).all()
        assert (np.diff(tree.probabilities) <= 1e-12).all()
        for node in range(len(tree)):
            below = tree.parents == node
            assert tree.probabilities[below].sum() <= tree.probabilities[node] + 1e-9
            assert len(set(tree.tokens[below].tolist())) == below.sum()
        assert all(0 < source.trust(where, matched) < 1 for where in Where for matched in range(30))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.lists(st.integers(1, 9), min_size=1))
def test_an_answer_may_come_in_pieces(text: list[int], lengths: list[int]) -> None:
    whole, pieces = TextDrafts(WORDS), TextDrafts(WORDS)
    for source in (whole, pieces):
        source.accept([7, 8, text[0]])
    whole.accept(text[1:])
    start = 1
    for length in lengths * len(text):
        pieces.accept(text[start : start + length])
        start += length
    trees = [source.propose(Context(text[-1], 0, 20)) for source in (whole, pieces)]
    assert trees[0].tokens.tolist() == trees[1].tokens.tolist()
    assert trees[0].probabilities.tolist() == trees[1].probabilities.tolist()


def test_a_step_looks_at_few_places_however_long_the_text_is() -> None:
    source = TextDrafts()
    source.accept([5] * 20_000)
    source.accept([5])
    assert len(source._matches) <= 4 * (LATEST + BEFORE + AFTER)


@given(st.integers(0, 99), st.integers(0, 99))
def test_tokens_of_the_prediction_that_are_in_the_answer_are_counted_once(start: int, end: int) -> None:
    source = TextDrafts(WORDS)
    part = WORDS[start:end]
    source.accept([7])
    source.accept([*part, 8, *part])
    # Where it was not expected, a few tokens alone do not tell that it is there.
    assert (len(part) if len(part) >= 8 else 0) <= source.found <= len(part)
    whole = TextDrafts(WORDS)
    whole.accept(WORDS[:1])
    whole.accept(WORDS[1:])
    assert whole.found == len(WORDS)


EDITS = st.lists(st.tuples(st.sampled_from(["replace", "put in", "leave out", "move"]), st.integers(0, 60)), max_size=6)


def edited(text: Sequence[int], edits: Sequence[tuple[str, int]]) -> list[int]:
    """Return the text with these edits, each somewhere."""
    found = list(text)
    for kind, number in edits:
        place = number % (len(found) + 1)
        if kind == "put in":
            found.insert(place, number % VOCAB)
        elif kind == "move":
            found = found[place:] + found[:place]
        elif place < len(found):
            found[place : place + 1] = [number % VOCAB] if kind == "replace" else []
    return found


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    st.lists(st.booleans(), min_size=1, max_size=7),
    EDITS,
    st.integers(1, 20),
    st.booleans(),
    st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_any_edits_give_the_tokens_of_plain_decoding(
    prompt: list[int],
    right: list[bool],
    edits: list[tuple[str, int]],
    rows: int,
    others: bool,
    rests: list[bool],
) -> None:
    """Also where it rests now and then, and is told later."""
    source = TextDrafts(edited(plain(prompt, 40), edits), [0], itself=others)
    sources: list[DraftSource] = [TransferDrafts(), source] if others else [source]
    drafter = Drafter(FixedSizes(TreeSizes(rows, (rows,) * 3)), sources)
    tokens: list[int] = []
    for count, certain in enumerate(islice(steps(known_engine(right), prompt, drafter), 15)):
        tokens += certain
        drafter.rests = rests[count % len(rests)]
    assert tokens == plain(prompt, len(tokens))
    drafter.catch_up()
    told = TextDrafts(edited(plain(prompt, 40), edits))
    told.accept([*prompt, tokens[0]])
    told.accept(tokens[1:])
    assert told.found <= told.prediction_tokens
    if not edits and rows > 1:
        assert source.found == told.found == min(40, len(tokens))


def test_a_right_prediction_comes_as_fast_as_trees_are_large() -> None:
    prompt = [1, 2, 3]
    drafter = Drafter(FixedSizes(TreeSizes(8, (0, 0, 0))), [TextDrafts(plain(prompt, 40))])
    found = list(islice(steps(known_engine([True]), prompt, drafter), 4))
    assert [len(certain) for certain in found] == [1, 8, 8, 8]


def test_what_it_is_told_after_a_rest_it_follows() -> None:
    source = TextDrafts(WORDS)
    drafter = Drafter(FixedSizes(TreeSizes(4, (0,))), [source])
    drafter.begin([5, WORDS[0]])
    drafter.rests = True
    drafter.accept(WORDS[1:10])
    assert len(drafter.offer(WORDS[9], [], 10).tree) == 1
    assert source.found == 1
    drafter.rests = False
    assert drafter.offer(WORDS[9], [], 10).tree.tokens.tolist() == WORDS[9:13]
    assert source.found == 10
