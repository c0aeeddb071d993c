import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.tree import Tree, TreeSizes, candidate_path, chain, root_alone
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


@given(st.integers(0, 1 << 21))
def test_a_root_alone_is_a_chain_of_one(token: int) -> None:
    expected = chain([token])
    for found in (root_alone(token), candidate_path(token, [], [])):
        for name in ("tokens", "parents", "depths", "probabilities"):
            array, wanted = getattr(found, name), getattr(expected, name)
            assert array.tolist() == wanted.tolist()
            assert array.dtype == wanted.dtype


def test_what_all_roots_share_cannot_be_changed_and_their_tokens_are_their_own() -> None:
    one, other = root_alone(3), root_alone(4)
    one.tokens[0] = 5
    assert other.tokens.tolist() == [4]
    for array in (one.parents, one.depths, one.probabilities):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7
