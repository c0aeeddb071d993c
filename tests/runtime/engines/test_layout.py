import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.drafting.best_first import likely_ends
from runtime.engines.layout import bucket, pad
from runtime.rows import lay_out
from runtime.tree import Tree, TreeSizes
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
