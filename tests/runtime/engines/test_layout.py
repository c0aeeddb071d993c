import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.drafting.best_first import likely_ends
from runtime.engines.layout import bucket, pad, shared_sizes, stack
from runtime.engines.protocol import Batch
from runtime.rows import lay_out, prompt_rows
from runtime.tree import Tree, TreeSizes, chain
from tests.strategies import trees


@given(trees(max_rows=9), st.tuples(*[st.integers(0, 9)] * 2), st.integers(1, 6), st.sampled_from([(0, 1), (1, 0)]))
def test_padding_adds_rows_that_nothing_sees_and_keeps_the_others(
    tree: Tree, counts: tuple[int, int], usual: int, join_order: tuple[int, int]
) -> None:
    rows = lay_out(tree, likely_ends(tree, counts), join_order, start=5)
    sizes = bucket([rows], TreeSizes(usual, (usual, usual)), 9)
    assert max(sizes.tree_rows, *sizes.pseudo_rows) <= 9
    padded = pad(rows, sizes, sizes.tree_rows, join_order)
    size = len(tree)
    assert len(padded.rows.input_ids) == sizes.tree_rows >= size
    assert [len(p) for p in padded.rows.pseudo_parents] == list(sizes.pseudo_rows)
    index = np.concatenate([np.arange(size), padded.pseudo + sizes.tree_rows])
    np.testing.assert_array_equal(padded.rows.tree_mask[np.ix_(index, index)], rows.tree_mask)
    np.testing.assert_array_equal(padded.rows.position_ids[index], rows.position_ids)
    others = np.setdiff1d(np.arange(len(padded.rows.position_ids)), index)
    assert padded.rows.tree_mask[others].sum() == len(others) == padded.rows.tree_mask[:, others].sum()
    for real, longer in zip(rows.pseudo_parents, padded.rows.pseudo_parents, strict=True):
        np.testing.assert_array_equal(longer[: len(real)], real)
    # A step's pseudo rows are contiguous, in join order.
    start = 0
    row = 0
    for step in join_order:
        count = len(rows.pseudo_parents[step])
        np.testing.assert_array_equal(padded.pseudo[row : row + count], start + np.arange(count))
        row += count
        start += sizes.pseudo_rows[step]


def test_usual_passes_have_the_usual_sizes() -> None:
    tree = Tree(np.arange(3), np.array([-1, 0, 0]), np.array([0, 1, 1]), np.array([1.0, 0.5, 0.2]))
    usual = TreeSizes(4, (4, 2))
    assert bucket([lay_out(tree, likely_ends(tree, (3, 1)), (0, 1), 0)], usual, 32) == usual
    assert bucket([lay_out(tree, likely_ends(tree, (3, 0)), (0, 1), 0)], usual, 32) == TreeSizes(4, (4, 0))
    assert bucket([lay_out(tree, likely_ends(tree, (0, 0)), (0, 1), 0)], usual, 3) == TreeSizes(3, (0, 0))
    assert bucket([lay_out(tree, likely_ends(tree, (3, 3)), (0, 1), 0)], usual, 32) == TreeSizes(4, (4, 4))
    root = Tree(np.array([7]), np.array([-1]), np.array([0]), np.array([1.0]))
    assert bucket([lay_out(root, likely_ends(root, (0, 0)), (0, 1), 0)], usual, 32) == TreeSizes(1, (0, 0))
    assert bucket([lay_out(root, likely_ends(root, (1, 1)), (0, 1), 0)], usual, 32) == TreeSizes(4, (4, 2))


class Cached:
    def __init__(self, length: int) -> None:
        self.length = length


@given(
    st.lists(
        st.tuples(trees(max_rows=9), st.tuples(*[st.integers(0, 9)] * 2), st.integers(0, 9)), min_size=1, max_size=4
    ),
    st.sampled_from([(0, 1), (1, 0)]),
    st.booleans(),
)
def test_requests_are_stacked_in_the_least_sizes_that_all_share(
    requests: list[tuple[Tree, tuple[int, int], int]], join_order: tuple[int, int], wider: bool
) -> None:
    rows = [lay_out(tree, likely_ends(tree, counts), join_order, start) for tree, counts, start in requests]
    batch = Batch.of(rows, [Cached(start) for _, _, start in requests])
    sizes = shared_sizes(rows)
    assert sizes.tree_rows == max(len(tree) for tree, _, _ in requests)
    wanted = TreeSizes(sizes.tree_rows + 2, tuple(count + 1 for count in sizes.pseudo_rows)) if wider else None
    found = stack(batch.rows, batch.lengths, join_order, wanted)
    assert found.sizes == (wanted or sizes)
    assert found.values["cache_length"].tolist() == [start for _, _, start in requests]
    letters = found.dims(capacity=7)
    assert letters == {
        "B": len(rows),
        "T": found.sizes.tree_rows,
        "R": found.sizes.tree_rows + sum(found.sizes.pseudo_rows),
        "M": found.sizes.tree_rows,
        "S": 7,
        "R_1": found.sizes.pseudo_rows[0],
        "R_2": found.sizes.pseudo_rows[1],
    }
    for index, one in enumerate(rows):
        size = len(one.input_ids)
        own = np.concatenate([np.arange(size), found.pseudo[index] + found.sizes.tree_rows])
        mask = found.values["tree_mask"][index]
        np.testing.assert_array_equal(mask[np.ix_(own, own)], one.tree_mask)
        # Nothing of one's own sees a row that was added.
        others = np.setdiff1d(np.arange(len(mask)), own)
        assert not mask[np.ix_(own, others)].any()
        np.testing.assert_array_equal(found.values["input_ids"][index, :size], one.input_ids)
        np.testing.assert_array_equal(found.values["position_ids"][index, own], one.position_ids)
        np.testing.assert_array_equal(found.values["logit_rows"][index, :size], one.logit_rows)


def test_a_single_request_is_laid_out_without_a_copy() -> None:
    rows = lay_out(chain([1, 2, 3]), (np.array([0, 2]), np.array([1])), (0, 1), 4)
    found = stack([rows], [4], (0, 1))
    assert np.shares_memory(found.values["tree_mask"], rows.tree_mask)
    assert np.shares_memory(found.values["input_ids"], rows.input_ids)


def test_requests_in_different_phases_are_not_one_batch() -> None:
    with pytest.raises(AssertionError, match="a pass is in one phase"):
        Batch.of([prompt_rows([1], (), 0), lay_out(chain([1]), (), (), 0)], [Cached(0), Cached(0)])
