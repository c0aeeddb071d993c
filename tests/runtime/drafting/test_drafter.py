from collections.abc import Sequence
from itertools import islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.drafting.correction import TokenCorrection
from runtime.drafting.drafter import Drafter
from runtime.drafting.drafts import DraftStep, IndependentDrafts
from runtime.drafting.reliability import Reliability
from runtime.drafting.sizing import AdaptiveSizes, FixedSizes, Menu
from runtime.drafting.source import Context, DraftSource
from runtime.drafting.text_drafts import TextDrafts
from runtime.drafting.transfer_drafts import TransferDrafts, tempered
from runtime.tree import Tree, TreeSizes, candidate_path
from tests.runtime.known_engine import steps
from tests.runtime.test_decode import VOCAB, known_engine, plain, random_correction
from tests.strategies import draft_steps

texts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)


@st.composite
def menus(draw: st.DrawFn) -> Menu:
    """Any sizes at any times, plain decoding first."""
    rows = st.integers(0, 9)
    drawn = draw(st.lists(st.builds(TreeSizes, st.integers(1, 9), st.tuples(rows, rows, rows)), max_size=6))
    sizes = tuple(dict.fromkeys([TreeSizes.plain(3), *drawn]))
    contexts = tuple(sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=3))))
    times = st.lists(st.floats(0.5, 3.0), min_size=len(sizes), max_size=len(sizes))
    return Menu(sizes, contexts, np.array([draw(times) for _ in contexts]))


@given(
    texts,
    st.lists(st.booleans(), min_size=1, max_size=7),
    menus(),
    st.floats(0.5, 3.0),
    st.none() | st.integers(0, 99).map(random_correction),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.5]),
)
def test_sizes_that_adapt_and_ngrams_give_the_tokens_of_plain_decoding(
    prompt: list[int],
    right: list[bool],
    menu: Menu,
    rate: float,
    correction: TokenCorrection | None,
    ngrams: bool,
    temperature: float,
) -> None:
    reliability = Reliability([[{"predicted": 0.5, "observed": 0.9}]])
    own = TextDrafts()
    layers = TransferDrafts(correction, reliability, temperature)
    drafter = Drafter(AdaptiveSizes(menu, rate), [layers, own] if ngrams else [layers])
    tokens: list[int] = []
    for count, certain in enumerate(islice(steps(known_engine(right), prompt, drafter), 25)):
        tokens += certain
        if ngrams and count and drafter.sizing.most_rows > 1:
            assert own.tokens == [*prompt, *tokens]
    assert tokens == plain(prompt, len(tokens))


@given(texts, draft_steps(max_steps=3), menus(), st.booleans(), st.integers(0, 40))
def test_a_proposal_is_of_a_size_on_the_menu_or_smaller(
    prompt: list[int], drafts: IndependentDrafts, menu: Menu, ngrams: bool, context: int
) -> None:
    drafter = Drafter(AdaptiveSizes(menu), [TransferDrafts(), *([TextDrafts()] if ngrams else [])])
    drafter.begin([*prompt, prompt[0]])
    for token in prompt:
        tree, ends = drafter.propose(token, drafts, context)
        assert tree.tokens[0] == token
        assert any(
            len(tree) <= sizes.tree_rows and all(map(int.__le__, map(len, ends), sizes.pseudo_rows))
            for sizes in menu.sizes
        )
        for nodes in ends:
            assert sorted(set(nodes.tolist())) == nodes.tolist()
            assert all(0 <= node < len(tree) for node in nodes)
        drafter.accept([token])


def test_a_text_that_repeats_itself_is_drafted_without_pseudo_rows() -> None:
    drafter = Drafter(FixedSizes(TreeSizes(4, (0, 0, 0))), [TextDrafts()])
    drafter.begin([1, 2, 3, 4, 5, 6, 1, 2, 3])
    tree, ends = drafter.propose(3, [], 8)
    assert tree.tokens.tolist() == [3, 4, 5, 6]
    assert tree.parents.tolist() == [-1, 0, 1, 2]
    assert [len(nodes) for nodes in ends] == [0, 0, 0]


def step(*probabilities: float) -> DraftStep:
    return DraftStep(np.arange(len(probabilities)), np.array(probabilities))


def test_greedy_drafts_are_worth_what_was_observed() -> None:
    reliability = Reliability([[{"predicted": 0.4, "observed": 0.3}], [{"predicted": 0.4, "observed": 0.2}]])
    drafter = Drafter(FixedSizes(TreeSizes(9, (1,))), [TransferDrafts(reliability=reliability)])
    tree, _ = drafter.propose(7, [step(0.4), step(0.4)], 0)
    np.testing.assert_allclose(tree.probabilities, [1.0, 0.3, 0.3 * 0.2])


def test_candidates_are_never_right_more_often_than_always() -> None:
    # One by one each was right more often than its draft said.
    reliability = Reliability([[{"predicted": 0.4, "observed": 0.7}]])
    drafter = Drafter(FixedSizes(TreeSizes(9, (9,))), [TransferDrafts(reliability=reliability)])
    tree, _ = drafter.propose(7, [step(0.4, 0.4, 0.2)], 0)
    assert tree.probabilities[1:].sum() <= 1 + 1e-9
    assert tree.probabilities[1] == tree.probabilities[2] > tree.probabilities[3]


def test_drafts_for_sampling_have_its_temperature_and_no_reliability() -> None:
    reliability = Reliability([[{"predicted": 0.5, "observed": 0.01}]])
    drafter = Drafter(FixedSizes(TreeSizes(3, (3,))), [TransferDrafts(None, reliability, 2.0)])
    drafted = step(0.5, 0.3, 0.2)
    tree, _ = drafter.propose(7, [drafted], 0)
    np.testing.assert_allclose(tree.probabilities[1:], tempered(drafted, 2.0).probabilities[:2])


def test_as_many_candidates_are_asked_for_as_are_of_use() -> None:
    sizing = FixedSizes(TreeSizes(5, (5, 5, 5)))

    def shortlist(*sources: DraftSource) -> int:
        return Drafter(sizing, sources).shortlist

    assert shortlist(TransferDrafts()) == 5
    assert shortlist(TransferDrafts(random_correction(0))) > 5
    assert shortlist(TransferDrafts(temperature=0.5)) > 5
    assert shortlist(TextDrafts(), TransferDrafts()) == 5
    assert Drafter(sizing, [TransferDrafts()]).draft_steps == 3


def test_pseudo_rows_that_no_source_reads_are_not_asked_for() -> None:
    drafter = Drafter(FixedSizes(TreeSizes(5, (5, 5, 5))), [TextDrafts()])
    assert (drafter.shortlist, drafter.draft_steps) == (0, 0)
    _, ends = drafter.propose(3, [], 0)
    assert [len(nodes) for nodes in ends] == [0, 0, 0]


class Foretold:
    """A source of one's own: a text known beforehand, as long as it is right."""

    name = "foretold"

    def __init__(self, text: list[int]) -> None:
        self.text = text
        self.taken: list[int] = []

    def shortlist(self, max_rows: int) -> int:
        return 0

    def propose(self, context: Context) -> Tree:
        right = self.taken == self.text[: len(self.taken)]
        rest = self.text[len(self.taken) :][: context.max_rows - 1] if right else []
        return candidate_path(context.token, rest, [0.9] * len(rest))

    def accept(self, tokens: Sequence[int]) -> None:
        self.taken += tokens


@given(texts, st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 9), st.integers(0, 30))
def test_a_source_added_later_touches_nothing_else(
    prompt: list[int], right: list[bool], rows: int, foretold: int
) -> None:
    known = [*prompt, *plain(prompt, foretold), 0, 0, 1]
    sources: list[DraftSource] = [TransferDrafts(), TextDrafts(), Foretold(known)]
    drafter = Drafter(FixedSizes(TreeSizes(rows, (rows, rows, rows))), sources)
    tokens = [token for certain in islice(steps(known_engine(right), prompt, drafter), 12) for token in certain]
    assert tokens == plain(prompt, len(tokens))


def test_a_text_known_beforehand_comes_as_fast_as_trees_are_large() -> None:
    prompt = [1, 2, 3]
    drafter = Drafter(FixedSizes(TreeSizes(8, (0, 0, 0))), [Foretold([*prompt, *plain(prompt, 40)])])
    found = list(islice(steps(known_engine([True]), prompt, drafter), 4))
    assert [len(certain) for certain in found] == [1, 8, 8, 8]


class Unasked:
    """A source that must be left alone."""

    name = "unasked"

    def shortlist(self, max_rows: int) -> int:
        return 4

    def propose(self, context: Context) -> Tree:
        raise AssertionError("asked what may follow")

    def accept(self, tokens: Sequence[int]) -> None:
        raise AssertionError("told what follows")


@given(texts, st.lists(st.booleans(), min_size=1, max_size=7), st.integers(0, 1), st.booleans())
def test_where_nothing_can_be_verified_no_source_is_asked_or_told(
    prompt: list[int], right: list[bool], pseudo_rows: int, adaptive: bool
) -> None:
    """Pseudo rows are run all the same where they are asked for, as measuring their time does."""
    sizes = TreeSizes(1, (pseudo_rows,) * 3)
    menu = Menu((TreeSizes.plain(3),), (0,), np.ones((1, 1)))
    drafter = Drafter(AdaptiveSizes(menu) if adaptive else FixedSizes(sizes), [Unasked()])
    tokens = [token for certain in islice(steps(known_engine(right), prompt, drafter), 12) for token in certain]
    assert tokens == plain(prompt, 12)
    step = DraftStep(np.array([3]), np.array([0.9]))
    offer = drafter.offer(5, [step], 7)
    assert (offer.tree.tokens.tolist(), offer.length, offer.drafted) == ([5], 7, True)
    assert not drafter.offer(5, [], 7).drafted
    assert [len(nodes) for nodes in drafter.cut(offer, sizes)[1]] == [pseudo_rows] * 3
