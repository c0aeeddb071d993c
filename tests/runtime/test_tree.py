import pytest
from hypothesis import given

from runtime.tree import Tree, TreeSizes
from tests.strategies import trees


@pytest.mark.parametrize(
    ("pseudo_rows", "steps"), [((4, 2, 2), 3), ((4, 0, 2), 1), ((0, 4, 2), 0), ((1,), 1), ((0,), 0), ((1,) * 5, 5)]
)
def test_draft_steps_are_of_use_up_to_the_first_without_rows(pseudo_rows: tuple[int, ...], steps: int) -> None:
    assert TreeSizes(4, pseudo_rows).draft_steps == steps


@given(trees())
def test_a_child_is_found_by_its_token_and_no_other(tree: Tree) -> None:
    for node in range(len(tree)):
        children = [child for child in range(1, len(tree)) if tree.parents[child] == node]
        for child in children:
            assert tree.child(node, int(tree.tokens[child])) == child
        assert tree.child(node, 999) is None
