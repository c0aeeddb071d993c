from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.drafting.best_first import best_first_tree, likely_ends, merge
from runtime.drafting.drafts import DraftStep, IndependentDrafts
from runtime.tree import Tree, candidate_path
from tests.strategies import draft_steps


def paths(tree: Tree) -> list[tuple[int, ...]]:
    """Return each node's tokens from below the root."""
    found: list[tuple[int, ...]] = []
    for node in range(len(tree)):
        found.append((*found[tree.parents[node]], int(tree.tokens[node])) if node else ())
    return found


@given(draft_steps(), st.integers(1, 20))
def test_a_best_first_tree_holds_the_most_probable_paths(drafts: IndependentDrafts, max_rows: int) -> None:
    tree = best_first_tree(7, drafts, max_rows)
    every_path = {
        tuple(int(d.tokens[rank]) for d, rank in zip(drafts, ranks, strict=False)): float(
            np.prod([d.probabilities[rank] for d, rank in zip(drafts, ranks, strict=False)])
        )
        for depth in range(len(drafts) + 1)
        for ranks in product(*(range(len(d.tokens)) for d in drafts[:depth]))
    }
    expected = sorted(every_path.values(), reverse=True)[:max_rows]
    assert len(tree) == len(expected)
    np.testing.assert_allclose(np.sort(tree.probabilities)[::-1], expected)
    for path, probability in zip(paths(tree), tree.probabilities, strict=True):
        assert every_path[path] == pytest.approx(probability)


@given(draft_steps(), st.integers(1, 20))
def test_a_best_first_tree_is_in_topological_order_without_twins(drafts: IndependentDrafts, max_rows: int) -> None:
    tree = best_first_tree(7, drafts, max_rows)
    assert tree.tokens[0] == 7
    assert tree.parents[0] == -1
    assert all(tree.parents[node] < node for node in range(1, len(tree)))
    assert all(tree.depths[node] == tree.depths[tree.parents[node]] + 1 for node in range(1, len(tree)))
    assert len(set(paths(tree))) == len(tree)


@given(draft_steps(), st.integers(1, 20), st.integers(1, 20))
def test_the_first_nodes_of_a_best_first_tree_are_the_smaller_tree(
    drafts: IndependentDrafts, max_rows: int, count: int
) -> None:
    found = best_first_tree(7, drafts, max_rows).first(count)
    expected = best_first_tree(7, drafts, min(count, max_rows))
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.parents.tolist() == expected.parents.tolist()
    assert found.depths.tolist() == expected.depths.tolist()
    assert found.probabilities.tolist() == expected.probabilities.tolist()


# Tokens of a chain, out of those that draft steps have, and the probability of each.
chains = st.lists(st.tuples(st.integers(0, 19), st.floats(0.01, 0.99)), max_size=8)


def grafted(tree: Tree, links: list[tuple[int, float]], max_rows: int = 99) -> Tree:
    path = candidate_path(7, [token for token, _ in links], [probability for _, probability in links])
    return merge(7, [tree, path], max_rows)


def assert_valid(tree: Tree) -> None:
    """A tree in topological order without twins, its nodes in falling probability, as probable as they can be."""
    assert (tree.tokens[0], tree.parents[0], tree.depths[0], tree.probabilities[0]) == (7, -1, 0, 1.0)
    assert (tree.parents[1:] < np.arange(1, len(tree))).all()
    assert (tree.parents[1:] >= 0).all()
    assert (tree.depths[1:] == tree.depths[tree.parents[1:]] + 1).all()
    assert len(set(paths(tree))) == len(tree)
    assert (np.diff(tree.probabilities) <= 0).all()
    assert (tree.probabilities[1:] <= tree.probabilities[tree.parents[1:]]).all()
    assert (tree.end_probabilities() >= -1e-9).all()


@given(draft_steps(), st.integers(1, 20), chains, st.integers(1, 20))
def test_a_tree_with_a_chain_is_a_best_first_tree(
    drafts: IndependentDrafts, rows: int, links: list[tuple[int, float]], max_rows: int
) -> None:
    tree = best_first_tree(7, drafts, rows)
    whole = grafted(tree, links)
    assert_valid(whole)
    tokens = tuple(token for token, _ in links)
    assert set(paths(whole)) == {*paths(tree), *(tokens[:count] for count in range(len(tokens) + 1))}
    found = grafted(tree, links, max_rows)
    assert_valid(found)
    assert paths(found) == paths(whole)[:max_rows]
    np.testing.assert_array_equal(found.probabilities, whole.probabilities[:max_rows])


@given(draft_steps(), st.integers(1, 20))
def test_a_tree_with_an_empty_chain_is_the_tree(drafts: IndependentDrafts, rows: int) -> None:
    tree = best_first_tree(7, drafts, rows)
    found = grafted(tree, [])
    assert dict(zip(paths(found), found.probabilities, strict=True)) == pytest.approx(
        dict(zip(paths(tree), tree.probabilities, strict=True))
    )


@given(chains)
def test_without_drafts_a_chain_is_as_probable_as_it_says(links: list[tuple[int, float]]) -> None:
    found = grafted(best_first_tree(7, IndependentDrafts(), 1), links)
    assert found.tokens[1:].tolist() == [token for token, _ in links]
    np.testing.assert_allclose(found.probabilities[1:], np.cumprod([probability for _, probability in links]))


@given(draft_steps(), st.integers(1, 20), st.lists(st.integers(20, 29), min_size=1, max_size=8))
def test_a_chain_that_is_nearly_certain_is_in_the_tree(drafts: IndependentDrafts, rows: int, tokens: list[int]) -> None:
    found = grafted(best_first_tree(7, drafts, rows), [(token, 0.999999) for token in tokens], len(tokens) + 1)
    assert paths(found)[-1] == tuple(tokens)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_token_that_both_the_drafts_and_the_chain_have_is_more_probable_than_either_says(
    drafted: float, chained: float
) -> None:
    step = DraftStep(np.array([3]), np.array([drafted]))
    found = grafted(best_first_tree(7, IndependentDrafts([step]), 2), [(3, chained)])
    assert found.tokens.tolist() == [7, 3]
    assert max(drafted, chained) < found.probabilities[1] < 1


@given(st.floats(0.5, 0.98), st.floats(0.01, 0.99))
def test_a_tree_that_knows_better_discounts_the_chain(drafted: float, chained: float) -> None:
    def probability(other: float) -> float:
        step = DraftStep(np.array([4]), np.array([other]))
        found = grafted(best_first_tree(7, IndependentDrafts([step]), 2), [(3, chained)])
        return float(found.probabilities[found.tokens.tolist().index(3)])

    assert probability(drafted + 0.01) < probability(drafted) <= chained + 1e-9


def test_a_chain_through_a_candidate_of_no_probability() -> None:
    steps = [DraftStep(np.array([1, 2]), np.array([1.0, 0.0])), DraftStep(np.array([3, 4]), np.array([0.5, 0.5]))]
    tree = best_first_tree(7, IndependentDrafts(steps), 9)
    found = grafted(tree, [(2, 0.9), (3, 0.9)])
    assert_valid(found)
    assert set(paths(found)) == set(paths(tree))


@given(draft_steps(), st.integers(1, 20))
def test_end_probabilities_are_a_distribution_over_nodes(drafts: IndependentDrafts, max_rows: int) -> None:
    ends = best_first_tree(7, drafts, max_rows).end_probabilities()
    assert ends.sum() == pytest.approx(1)
    assert (ends > -1e-9).all()


def test_pseudo_rows_go_where_acceptance_most_probably_ends() -> None:
    # The root's children take .6 and .1; the first child's child takes .5 of all: ends .3, .1, .1, .5.
    tree = Tree(np.arange(4), np.array([-1, 0, 0, 1]), np.array([0, 1, 1, 2]), np.array([1.0, 0.6, 0.1, 0.5]))
    np.testing.assert_allclose(tree.end_probabilities(), [0.3, 0.1, 0.1, 0.5])
    first, second, none = likely_ends(tree, (2, 1, 0))
    assert first.tolist() == [0, 3]
    assert second.tolist() == [3]
    assert none.tolist() == []


@given(draft_steps(), draft_steps(), st.integers(1, 20), st.integers(1, 20))
def test_two_trees_merge_into_a_best_first_tree_of_their_paths(
    drafts: IndependentDrafts, others: IndependentDrafts, rows: int, max_rows: int
) -> None:
    trees = [best_first_tree(7, drafts, rows), best_first_tree(7, others, rows)]
    whole, found = merge(7, trees, 99), merge(7, trees, max_rows)
    assert_valid(whole)
    assert set(paths(whole)) == {*paths(trees[0]), *paths(trees[1])}
    assert paths(found) == paths(whole)[:max_rows]
    # The children of a node are together never more than certain.
    for node in range(len(whole)):
        below = whole.probabilities[1:][whole.parents[1:] == node]
        assert below.sum() <= whole.probabilities[node] * (1 + 1e-9)


def test_a_drawn_merge() -> None:
    """Transfer layers say 3 (0.6), then 4 (0.5); the text itself says 3, then 5, each 0.8. Both agree on 3, and 5 is
    surer than 4.
    """
    drafts = IndependentDrafts([DraftStep(np.array([3]), np.array([0.6])), DraftStep(np.array([4]), np.array([0.5]))])
    found = merge(7, [best_first_tree(7, drafts, 3), candidate_path(7, [3, 5], [0.8, 0.8])], 9)
    assert found.tokens.tolist() == [7, 3, 5, 4]
    assert found.parents.tolist() == [-1, 0, 1, 1]
    # 0.8 + 0.2 * 0.6; then 5 has 0.8 * 0.5 / (0.8 * 0.5 + 0.2 * 0.5), and 4 what that leaves of 0.5.
    np.testing.assert_allclose(found.probabilities, [1.0, 0.92, 0.92 * 0.8, 0.92 * 0.2 * 0.5])


def test_no_proposals_leave_the_certain_token_alone() -> None:
    assert merge(7, [], 5).tokens.tolist() == [7]


def test_a_proposal_that_is_certain_wins_over_one_that_is_certain_too() -> None:
    found = merge(7, [candidate_path(7, [3], [1.0]), candidate_path(7, [4], [1.0])], 9)
    assert np.isfinite(found.probabilities).all()
    assert found.probabilities[1:].sum() <= 1.0
