"""Sizes on their own: a simulated text says which drafts are right, and a table how long passes take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.drafting.best_first import best_first_tree, likely_ends
from runtime.drafting.drafts import DraftStep, IndependentDrafts
from runtime.drafting.sizing import AdaptiveSizes, FixedSizes, Menu, Sizing
from runtime.tree import Tree, TreeSizes, candidate_path

PLAIN = TreeSizes.plain(3)
SIZES = (
    PLAIN,
    TreeSizes(4, (4, 2, 2)),
    TreeSizes(1, (1, 1, 1)),
    TreeSizes(2, (2, 1, 1)),
    TreeSizes(3, (3, 2, 2)),
    TreeSizes(8, (8, 4, 4)),
    TreeSizes(2, (0, 0, 0)),
    TreeSizes(4, (0, 0, 0)),
)
# Plain passes that a tree row and a pseudo row add: as measured on two CPU cores with float32 and int8 weights, and as
# on a GPU.
ROW_TIMES = {"cheap": (0.03, 0.013), "dear": (0.1, 0.1), "free": (0.002, 0.002)}


def menu_of(tree_row: float, pseudo_row: float, sizes: tuple[TreeSizes, ...] = SIZES) -> Menu:
    times = [1 + tree_row * (one.tree_rows - 1) + pseudo_row * sum(one.pseudo_rows) for one in sizes]
    return Menu(sizes, (128,), np.array([times]))


# Tells whether the drafts made at a position are worth what they say, by the tokens before it.
Honest = Callable[[int], bool]


def always(position: int) -> bool:
    return True


def never(position: int) -> bool:
    return False


@dataclass
class Text:
    """At each position, drafts of K steps with candidates 0, 1, 2 and 3, one of which is right, or (-1) none."""

    tokens: int
    honest: Honest = always
    steps: int = 3
    seed: int = 0
    drafts: list[IndependentDrafts] = field(init=False)
    right: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        # Some places are easy and others hard to draft, and later steps harder, much as in real text.
        best = rng.beta(0.9, 0.6, (self.tokens, 1)) * 0.85 ** np.arange(self.steps)
        probabilities = np.stack([best, (1 - best) * 0.4 * best, (1 - best) * 0.2 * best, (1 - best) * 0.1 * best], -1)
        drawn = rng.random((self.tokens, self.steps, 1))
        ranks = (drawn > np.cumsum(probabilities, -1)).sum(-1)
        self.right = [
            [int(rank) if rank < 4 and self.honest(position) else -1 for rank in ranks[position]]
            for position in range(self.tokens)
        ]
        self.drafts = [
            IndependentDrafts(DraftStep(np.arange(4), step) for step in probabilities[position])
            for position in range(self.tokens)
        ]

    def tree(self, position: int, steps: int, rows: int) -> Tree:
        return best_first_tree(0, IndependentDrafts(self.drafts[position][:steps]), rows)


@dataclass
class Decoded:
    tokens: int = 0
    time: float = 0.0
    chosen: list[TreeSizes] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens in the time of a plain pass."""
        return self.tokens / self.time

    def drafting(self, start: int = 0) -> float:
        """The share of steps that drafted."""
        return sum(any(one.pseudo_rows) for one in self.chosen[start:]) / len(self.chosen[start:])


def decode(sizing: Sizing, text: Text, menu: Menu) -> Decoded:
    """Decode `text` to its end; `menu` has the true times."""
    found = Decoded()
    position, steps = 0, sizing.draft_steps
    seconds = dict(zip(menu.sizes, (menu.at(128) / menu.at(128)[0]).tolist(), strict=True))
    while position < text.tokens:
        whole = text.tree(position, steps, sizing.most_rows)
        sizes = sizing.choose(whole, 128, steps > 0)
        tree = whole.first(sizes.tree_rows)
        node = accepted = 0
        while accepted < steps and (child := tree.child(node, text.right[position][accepted])) is not None:
            node, accepted = child, accepted + 1
        sizing.learn(accepted)
        found.chosen.append(sizes)
        found.time += seconds[sizes]
        found.tokens += accepted + 1
        position += accepted + 1
        ends = likely_ends(tree, sizes.pseudo_rows)
        steps = next((k for k, nodes in enumerate(ends) if node not in nodes), len(ends))
    return found


@given(st.integers(0, 5000), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_no_pass_takes_less_than_the_least_that_was_measured(context: int, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    contexts = tuple(sorted(rng.choice(2000, count, replace=False).tolist()))
    # Measured on a machine so busy that a longer context may look faster.
    seconds = rng.uniform(0.01, 0.03, (count, len(SIZES)))
    found = Menu(SIZES, contexts, seconds).at(context)
    assert (found >= seconds.min(axis=0) - 1e-12).all()


def test_times_are_those_measured_and_linear_between_and_beyond_contexts() -> None:
    menu = Menu(SIZES[:2], (100, 200, 400), np.array([[1.0, 2.0], [2.0, 3.0], [3.0, 5.0]]))
    assert menu.at(0).tolist() == menu.at(100).tolist() == [1.0, 2.0]
    assert menu.at(150).tolist() == [1.5, 2.5]
    assert menu.at(200).tolist() == [2.0, 3.0]
    assert menu.at(300).tolist() == [2.5, 4.0]
    assert menu.at(400).tolist() == [3.0, 5.0]
    assert menu.at(800).tolist() == [5.0, 9.0]


def test_one_context_stands_for_all() -> None:
    menu = Menu(SIZES[:2], (100,), np.array([[1.0, 2.0]]))
    assert menu.at(0).tolist() == menu.at(9999).tolist() == [1.0, 2.0]


def test_fixed_sizes_are_the_same_whatever_comes() -> None:
    sizes = TreeSizes(5, (4, 0, 2))
    fixed = FixedSizes(sizes)
    assert (fixed.most_rows, fixed.draft_steps) == (5, 1)
    text = Text(30)
    for position in range(30):
        assert fixed.choose(text.tree(position, position % 4, 5), position, position % 4 > 0) == sizes
        fixed.learn(position % 3)


def test_the_most_that_a_menu_offers() -> None:
    adaptive = AdaptiveSizes(menu_of(0.1, 0.1, (PLAIN, TreeSizes(6, (6, 0, 3)), TreeSizes(4, (1, 1, 0)))))
    assert (adaptive.most_rows, adaptive.draft_steps) == (6, 2)


def test_plain_decoding_alone_on_the_menu() -> None:
    adaptive = AdaptiveSizes(menu_of(0.1, 0.1, (PLAIN,)))
    assert (adaptive.most_rows, adaptive.draft_steps) == (1, 0)
    assert decode(adaptive, Text(100), menu_of(0.1, 0.1, (PLAIN,))).chosen == [PLAIN] * 100


@pytest.mark.parametrize("tree_row", [0.9, 3.0])
def test_rows_that_cost_more_than_they_can_bring_are_left_alone(tree_row: float) -> None:
    menu = menu_of(tree_row, 1.0)
    found = decode(AdaptiveSizes(menu), Text(400), menu)
    assert found.rate > 0.98
    assert found.drafting() < 0.03


def test_rows_that_cost_nothing_are_all_used() -> None:
    menu = menu_of(0.0, 0.0)
    adaptive = AdaptiveSizes(menu)
    text = Text(50)
    for position in range(50):
        assert adaptive.choose(text.tree(position, 3, 8), 128, True) == TreeSizes(8, (8, 4, 4))
        adaptive.learn(1)


def test_choices_depend_on_nothing_but_what_was_seen() -> None:
    menu = menu_of(*ROW_TIMES["dear"])
    one, other = (decode(AdaptiveSizes(menu), Text(200, seed=3), menu) for _ in range(2))
    assert one.chosen == other.chosen
    assert len(set(one.chosen)) > 2


@pytest.mark.parametrize("steps", [1, 5, 7])
@pytest.mark.parametrize("times", ROW_TIMES)
def test_any_number_of_draft_steps(steps: int, times: str) -> None:
    sizes = tuple(TreeSizes(one.tree_rows, (one.pseudo_rows * 3)[:steps]) for one in SIZES)
    menu = menu_of(*ROW_TIMES[times], sizes)
    found = decode(AdaptiveSizes(menu), Text(200, steps=steps), menu)
    assert found.rate > (1.0 if times == "dear" else 1.2)


@pytest.mark.parametrize("times", ROW_TIMES)
def test_drafts_that_are_never_right_are_given_up(times: str) -> None:
    menu = menu_of(*ROW_TIMES[times])
    short, long = (decode(AdaptiveSizes(menu), Text(tokens, never), menu) for tokens in (100, 700))
    assert short.time < 103
    # They are tried again now and then, as often as little time allows.
    assert long.time - short.time < 600 * 1.02
    if times == "dear":
        assert 0 < long.drafting(100) < 0.05


@pytest.mark.parametrize("times", ROW_TIMES)
def test_drafts_that_are_right_again_are_used_again(times: str) -> None:
    menu = menu_of(*ROW_TIMES[times])
    rate = decode(AdaptiveSizes(menu), Text(500), menu).rate
    later = decode(AdaptiveSizes(menu), Text(1100, lambda position: position >= 500), menu)
    useless = decode(AdaptiveSizes(menu), Text(500, never), menu)
    # Some passes of the last 600 tokens are plain, before it is noticed.
    assert 600 / (later.time - useless.time) > 1 + 0.6 * (rate - 1)


def test_drafts_are_tried_again_where_the_menu_drafts_for_large_trees_only() -> None:
    menu = menu_of(*ROW_TIMES["cheap"], (PLAIN, TreeSizes(8, (8, 8, 8))))
    found = decode(AdaptiveSizes(menu), Text(1000, lambda position: position >= 100), menu)
    assert found.drafting(300) > 0.5


@st.composite
def menus(draw: st.DrawFn) -> Menu:
    rows = st.integers(0, 12)
    sizes = (PLAIN, *draw(st.lists(st.builds(TreeSizes, st.integers(1, 12), st.tuples(rows, rows, rows)), max_size=6)))
    times = [1.0, *draw(st.lists(st.floats(0.9, 4.0), min_size=len(sizes) - 1, max_size=len(sizes) - 1))]
    return Menu(tuple(dict.fromkeys(sizes)), (128,), np.array([times[: len(set(sizes))]]))


@settings(max_examples=25)
@given(menus(), st.integers(0, 99), st.floats(0.0, 2.0))
def test_drafts_that_are_never_right_hardly_cost_anything_whatever_the_menu(
    menu: Menu, seed: int, draft_value: float
) -> None:
    found = decode(AdaptiveSizes(menu, 2.0, draft_value), Text(150, never, seed=seed), menu)
    assert found.time < 150 * 1.03


@settings(max_examples=25)
@given(menus(), st.integers(0, 99), st.floats(0.0, 0.5))
def test_luck_does_not_lead_to_losses(menu: Menu, seed: int, luck: float) -> None:
    # Tokens are accepted whatever the drafts promise: for a time more, then none.
    adaptive = AdaptiveSizes(menu)
    text = Text(300, seed=seed)
    seconds = dict(zip(menu.sizes, menu.seconds[0].tolist(), strict=True))
    tokens = time = 0.0
    for position, drawn in enumerate(np.random.default_rng(seed).random(300)):
        sizes = adaptive.choose(text.tree(position, position % 4, adaptive.most_rows), 128, position % 4 > 0)
        accepted = min(sizes.tree_rows - 1, 2) if position < 150 and drawn < luck else 0
        adaptive.learn(accepted)
        tokens += accepted + 1
        time += seconds[sizes]
    assert time < 1.04 * tokens


@pytest.mark.parametrize("honesty", [1.0, 0.7, 0.4, 0.0])
@pytest.mark.parametrize("times", ROW_TIMES)
def test_adaptive_sizes_are_nearly_as_fast_as_the_best_ones_and_never_slower_than_plain(
    times: str, honesty: float
) -> None:
    menu = menu_of(*ROW_TIMES[times])
    sincere = np.random.default_rng(1).random(400) < honesty
    text = Text(400, lambda position: bool(sincere[position]))
    rates = {sizes: decode(FixedSizes(sizes), text, menu).rate for sizes in SIZES[:6]}
    adaptive = decode(AdaptiveSizes(menu), text, menu).rate
    assert adaptive > 0.94 * max(rates.values()), rates
    assert adaptive > 0.97


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(2, 9), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8, unique=True
    ),
    seed=st.integers(0, 1 << 16),
)
def test_no_size_of_a_settled_menu_is_slower_than_one_that_holds_it(
    sizes: list[tuple[int, int, int]], seed: int
) -> None:
    chosen = (TreeSizes.plain(2), *(TreeSizes(rows, (first, min(first, second))) for rows, first, second in sizes))
    chosen = tuple(dict.fromkeys(chosen))
    measured = np.random.default_rng(seed).uniform(0.01, 1.0, (2, len(chosen)))
    settled = Menu(chosen, (64, 512), measured).settled()
    assert (settled.seconds <= measured).all()
    rows = [(one.tree_rows, *one.pseudo_rows) for one in chosen]
    for small, first in enumerate(rows):
        larger = [n for n, other in enumerate(rows) if all(b >= a for a, b in zip(first, other, strict=True))]
        # The time is one that was measured, of the size itself or of one that holds it.
        np.testing.assert_array_equal(settled.seconds[:, small], measured[:, larger].min(1))


def test_a_busy_moment_while_plain_decoding_was_timed_is_seen() -> None:
    chosen = (TreeSizes.plain(1), TreeSizes(1, (1,)), TreeSizes(4, (2,)))
    settled = Menu(chosen, (64,), np.array([[0.211, 0.036, 0.04]])).settled()
    assert settled.seconds.tolist() == [[0.036, 0.036, 0.04]]


def test_a_menu_of_longer_paths_has_times_as_rows_cost_so_far() -> None:
    menu = menu_of(*ROW_TIMES["cheap"])
    longer = menu.longer(32)
    assert longer.sizes[: len(SIZES)] == SIZES
    added = longer.sizes[len(SIZES) :]
    assert [one.tree_rows for one in added if not any(one.pseudo_rows)] == [12, 16, 24, 32]
    assert TreeSizes(32, (1, 1, 1)) in added
    np.testing.assert_allclose(longer.seconds, menu_of(*ROW_TIMES["cheap"], longer.sizes).seconds)
    assert menu.longer(8) is menu
    plain = menu_of(0.1, 0.1, (PLAIN,))
    assert plain.longer(64) is plain


def path_of(probability: float, rows: int) -> Tree:
    return candidate_path(0, list(range(1, rows)), [probability] * (rows - 1))


@pytest.mark.parametrize(("times", "least"), [("cheap", 48), ("dear", 24), ("free", 64)])
def test_a_path_that_is_nearly_certain_is_let_through_as_far_as_it_pays(times: str, least: int) -> None:
    menu = menu_of(*ROW_TIMES[times]).longer(64)
    adaptive = AdaptiveSizes(menu, 2.0)
    for _ in range(12):
        chosen = adaptive.choose(path_of(0.999, 64), 128, drafted=False).tree_rows
        adaptive.learn(chosen - 1)
    assert chosen >= least


def test_a_path_that_is_never_right_costs_hardly_anything() -> None:
    menu = menu_of(*ROW_TIMES["cheap"]).longer(64)
    adaptive = AdaptiveSizes(menu, 2.0)
    seconds = dict(zip(menu.sizes, menu.seconds[0].tolist(), strict=True))
    time = 0.0
    for _ in range(150):
        time += seconds[adaptive.choose(path_of(0.95, 64), 128, drafted=False)]
        adaptive.learn(0)
    assert time < 150 * 1.03
