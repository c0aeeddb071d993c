from itertools import islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.calibration import Calibration
from runtime.drafter import Drafter
from runtime.drafts import DraftStep, IndependentDrafts, TokenCorrection, tempered
from runtime.loop import draft_and_verify
from runtime.ngrams import Ngrams
from runtime.sizing import AdaptiveSizes, FixedSizes, Menu
from runtime.tree import TreeSizes
from tests.runtime.test_loop import VOCAB, KnownEngine, plain, random_correction
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
    calibration = Calibration([[{"predicted": 0.5, "observed": 0.9}]])
    own = Ngrams() if ngrams else None
    drafter = Drafter(AdaptiveSizes(menu, rate), correction, calibration, temperature, own)
    tokens: list[int] = []
    for certain in islice(draft_and_verify(KnownEngine(right), prompt, drafter, 8), 25):
        tokens += certain
        if own is not None:
            # The last token is taken when it becomes the root of a tree.
            assert own.tokens == [*prompt, *tokens[:-1]]
    assert tokens == plain(prompt, len(tokens))


@given(texts, draft_steps(max_steps=3), menus(), st.booleans(), st.integers(0, 40))
def test_a_proposal_is_of_a_size_on_the_menu_or_smaller(
    prompt: list[int], drafts: IndependentDrafts, menu: Menu, ngrams: bool, context: int
) -> None:
    drafter = Drafter(AdaptiveSizes(menu), ngrams=Ngrams() if ngrams else None)
    drafter.begin(prompt)
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
        drafter.learn([], token)


def test_a_text_that_repeats_itself_is_drafted_without_pseudo_rows() -> None:
    drafter = Drafter(FixedSizes(TreeSizes(4, (0, 0, 0))), ngrams=Ngrams())
    drafter.begin([1, 2, 3, 4, 5, 6, 1, 2])
    tree, ends = drafter.propose(3, [], 8)
    assert tree.tokens.tolist() == [3, 4, 5, 6]
    assert tree.parents.tolist() == [-1, 0, 1, 2]
    assert [len(nodes) for nodes in ends] == [0, 0, 0]


def step(*probabilities: float) -> DraftStep:
    return DraftStep(np.arange(len(probabilities)), np.array(probabilities))


def test_greedy_drafts_are_worth_what_was_observed() -> None:
    calibration = Calibration([[{"predicted": 0.4, "observed": 0.3}], [{"predicted": 0.4, "observed": 0.2}]])
    drafter = Drafter(FixedSizes(TreeSizes(9, (1,))), calibration=calibration)
    tree, _ = drafter.propose(7, [step(0.4), step(0.4)], 0)
    np.testing.assert_allclose(tree.probabilities, [1.0, 0.3, 0.3 * 0.2])


def test_candidates_are_never_right_more_often_than_always() -> None:
    # One by one each was right more often than its draft said.
    calibration = Calibration([[{"predicted": 0.4, "observed": 0.7}]])
    drafter = Drafter(FixedSizes(TreeSizes(9, (9,))), calibration=calibration)
    tree, _ = drafter.propose(7, [step(0.4, 0.4, 0.2)], 0)
    assert tree.probabilities[1:].sum() <= 1 + 1e-9
    assert tree.probabilities[1] == tree.probabilities[2] > tree.probabilities[3]


def test_drafts_for_sampling_have_its_temperature_and_no_calibration() -> None:
    calibration = Calibration([[{"predicted": 0.5, "observed": 0.01}]])
    drafter = Drafter(FixedSizes(TreeSizes(3, (3,))), calibration=calibration, temperature=2.0)
    drafted = step(0.5, 0.3, 0.2)
    tree, _ = drafter.propose(7, [drafted], 0)
    np.testing.assert_allclose(tree.probabilities[1:], tempered(drafted, 2.0).probabilities[:2])


def test_as_many_candidates_are_asked_for_as_are_of_use() -> None:
    sizing = FixedSizes(TreeSizes(5, (5, 5, 5)))
    assert Drafter(sizing).shortlist == 5
    assert Drafter(sizing, random_correction(0)).shortlist > 5
    assert Drafter(sizing, temperature=0.5).shortlist > 5
    assert Drafter(sizing).draft_steps == 3
