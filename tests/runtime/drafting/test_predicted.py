"""A prediction as a draft source: what it proposes where an answer says the same, and where it parts from it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.drafting.drafter import Drafter
from runtime.drafting.ngrams import Ngrams
from runtime.drafting.predicted import BRANCHES, Predicted, Trust, Where
from runtime.drafting.sizing import FixedSizes
from runtime.drafting.source import Context, DraftSource
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.tree import Tree, TreeSizes
from tests.runtime.known_engine import steps
from tests.runtime.test_decode import VOCAB, known_engine, plain

# Words that come once each, so that there is one place for each.
WORDS = list(range(100, 200))


def proposed(source: Predicted, answer: Sequence[int], rows: int = 9) -> Tree:
    """Return what `source` proposes after `answer`, token by token."""
    tree = Tree.first(source.propose(Context(answer[0], 0, rows)), 1)
    for token in answer:
        source.accept([token])
        tree = source.propose(Context(token, 0, rows))
    return tree


def likeliest(tree: Tree) -> list[int]:
    """Return the tokens of the path of the likeliest nodes, without the root."""
    path, node = [], 0
    while (child := next((n for n in range(node + 1, len(tree)) if tree.parents[n] == node), None)) is not None:
        path.append(int(tree.tokens[child]))
        node = child
    return path


def passes(prediction: Sequence[int], answer: Sequence[int], rows: int = 32) -> int:
    """Return the passes that `answer` takes where nothing else is drafted from."""
    source = Predicted(prediction)
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
    assert likeliest(proposed(Predicted(WORDS), WORDS[:1])) == WORDS[1:9]
    assert likeliest(proposed(Predicted(WORDS), WORDS[:20])) == WORDS[20:28]


def test_the_tokens_of_the_prompt_are_no_part_of_the_answer() -> None:
    source = Predicted(WORDS, prompt_tokens=3)
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
    tree = proposed(Predicted(WORDS), answer)
    assert WORDS[follows] in tree.tokens[tree.depths == 1]
    assert likeliest(tree)[:2] == WORDS[follows : follows + 2]


def test_a_change_costs_few_passes() -> None:
    answer = [*WORDS[:30], 7, *WORDS[31:60], 8, 9, *WORDS[60:80], *WORDS[85:]]
    assert passes(WORDS, WORDS) == 5
    assert passes(WORDS, answer) <= 5 + 3 * 2


def test_places_that_are_as_likely_are_branches() -> None:
    prediction = [1, 2, 3, 4, 50, 51, 1, 2, 3, 4, 60, 61, 1, 2, 3, 4, 70, 71, 1, 2, 3, 4, 80, 81]
    source = Predicted(prediction)
    tree = proposed(source, [9, 9, 9, 9, 9, 9, 1, 2, 3, 4], rows=64)
    assert len(source.guesses()) == BRANCHES
    assert set(tree.tokens[tree.depths == 1].tolist()) <= {50, 60, 70, 80}
    assert (tree.depths == 1).sum() == BRANCHES


def test_after_its_end_the_answers_end_is_proposed() -> None:
    tree = proposed(Predicted(WORDS, ends=(2, 3)), WORDS[:97], rows=32)
    assert tree.tokens.tolist() == [WORDS[96], *WORDS[97:], 2, 3]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 3]
    assert proposed(Predicted(WORDS, ends=(2,)), WORDS, rows=32).tokens.tolist() == [WORDS[-1], 2]


def test_a_sure_path_is_as_long_as_trees_may_be() -> None:
    words = list(range(1000))
    tree = proposed(Predicted(words), words[:500], rows=64)
    assert tree.tokens.tolist() == words[499:563]
    assert tree.probabilities[-1] > 0.8


def test_an_answer_that_is_nothing_like_it_is_left_alone() -> None:
    answer = [5, 6, 7, 8, 9] * 20
    assert len(proposed(Predicted(WORDS), answer)) == 1
    # Single words in common are soon not believed.
    answer = [token for word in WORDS[:40] for token in (5, word, 6)]
    assert proposed(Predicted(WORDS[::-1]), [*answer, WORDS[70]]).probabilities[1:].sum() < 0.2


def test_no_prediction_proposes_nothing() -> None:
    assert len(proposed(Predicted([]), [1, 2, 3])) == 1
    assert len(Predicted(WORDS).propose(Context(5, 0, 9))) == 1


def test_trust_grows_with_the_match_and_is_learned() -> None:
    trust = Trust()
    for where in Where:
        assert all(trust.of(where, few) <= trust.of(where, few + 1) for few in range(40))
    assert trust.of(Where.EXPECTED, 3) > trust.of(Where.NEAR, 3) > trust.of(Where.FAR, 3)
    before = trust.of(Where.NEAR, 3)
    trust.learn(Where.NEAR, 3, right=False)
    assert trust.of(Where.NEAR, 3) < before
    trust.learn(Where.FAR, 90, right=True)
    assert trust.of(Where.FAR, 24) == trust.of(Where.FAR, 90) > Trust().of(Where.FAR, 90)


@given(st.integers(0, 99), st.integers(0, 99))
def test_tokens_of_the_prediction_that_are_in_the_answer_are_counted_once(start: int, end: int) -> None:
    source = Predicted(WORDS)
    part = WORDS[start:end]
    source.accept([7, *part, 8, *part])
    # Where it was not expected, a few tokens alone do not tell that it is there.
    assert (len(part) if len(part) >= 8 else 0) <= source.found <= len(part)
    whole = Predicted(WORDS)
    whole.accept(WORDS)
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
    source = Predicted(edited(plain(prompt, 40), edits), len(prompt), [0])
    sources: list[DraftSource] = [TransferDrafts(), Ngrams(), source] if others else [source]
    drafter = Drafter(FixedSizes(TreeSizes(rows, (rows,) * 3)), sources)
    tokens: list[int] = []
    for count, certain in enumerate(islice(steps(known_engine(right), prompt, drafter), 15)):
        tokens += certain
        drafter.rests = rests[count % len(rests)]
    assert tokens == plain(prompt, len(tokens))
    drafter.catch_up()
    told = Predicted(source.tokens, len(prompt))
    told.accept([*prompt, *tokens])
    assert told.found <= len(told.tokens)
    if not edits and rows > 1:
        assert source.found == told.found == min(40, len(tokens))


def test_a_right_prediction_comes_as_fast_as_trees_are_large() -> None:
    prompt = [1, 2, 3]
    drafter = Drafter(FixedSizes(TreeSizes(8, (0, 0, 0))), [Predicted(plain(prompt, 40), 3)])
    found = list(islice(steps(known_engine([True]), prompt, drafter), 4))
    assert [len(certain) for certain in found] == [1, 8, 8, 8]


def test_what_it_is_told_after_a_rest_it_follows() -> None:
    source = Predicted(WORDS, 1)
    drafter = Drafter(FixedSizes(TreeSizes(4, (0,))), [source])
    drafter.begin([5, WORDS[0]])
    drafter.rests = True
    drafter.accept(WORDS[1:10])
    assert len(drafter.offer(WORDS[9], [], 10).tree) == 1
    assert source.found == 1
    drafter.rests = False
    assert drafter.offer(WORDS[9], [], 10).tree.tokens.tolist() == WORDS[9:13]
    assert source.found == 10
