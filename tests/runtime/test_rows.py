import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.rows import Phase, lay_out, prompt_rows
from runtime.tree import Tree, chain
from tests.five_nodes import EXAMPLE
from tests.strategies import trees


def test_the_drawn_pass() -> None:
    """The tree of `docs/architecture.md`: the certain "the", then "cat" or "dog", then "sat" or "is" after "cat"; two
    draft steps, for "cat" and "is", and for "is".
    """
    rows = EXAMPLE.example_rows()
    drawn = """
        the    T . . . . . . .
        cat    T T . . . . . .
        dog    T . T . . . . .
        sat    T T . T . . . .
        is     T T . . T . . .
        cat+1  T T . . . T . .
        is+1   T T . . T . T .
        is+2   T T . . T . T T
    """
    expected = [[mark == "T" for mark in line.split()[1:]] for line in drawn.strip().splitlines()]
    assert rows.tree_mask.tolist() == expected
    assert rows.position_ids.tolist() == [10, 11, 11, 12, 12, 12, 13, 14]
    assert [parents.tolist() for parents in rows.pseudo_parents] == [[1, 4], [4]]


def test_the_picture_is_that_of_the_rows() -> None:
    assert EXAMPLE.PICTURE.read_text(encoding="utf-8") == EXAMPLE.draw(), "draw it again: python docs/draw_pass.py"


@given(trees(), st.data())
def test_a_row_sees_itself_its_ancestors_and_its_earlier_pseudo_siblings(tree: Tree, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 3))
    join_order = data.draw(st.permutations(range(steps)))
    nodes = st.lists(st.integers(0, len(tree) - 1), unique=True, max_size=len(tree)).map(sorted)
    pseudo_parents = tuple(np.array(data.draw(nodes), dtype=np.int64) for _ in range(steps))
    start = data.draw(st.integers(0, 50))
    rows = lay_out(tree, pseudo_parents, join_order, start)

    def ancestors(node: int) -> set[int]:
        return set() if node < 0 else {node} | ancestors(int(tree.parents[node]))

    owners = [(int(parent), step) for step in join_order for parent in pseudo_parents[step]]
    size = len(tree)
    for node in range(size):
        assert set(np.flatnonzero(rows.tree_mask[node])) == ancestors(node)
        assert rows.position_ids[node] == start + tree.depths[node]
    for index, (parent, step) in enumerate(owners):
        siblings = {size + j for j, (other, earlier) in enumerate(owners) if other == parent and earlier <= step}
        assert set(np.flatnonzero(rows.tree_mask[size + index])) == ancestors(parent) | siblings
        assert rows.position_ids[size + index] == start + tree.depths[parent] + step + 1


@given(st.lists(st.integers(0, 99), min_size=1, max_size=30))
def test_a_chain_is_causal(tokens: list[int]) -> None:
    rows = lay_out(chain(tokens), (), (), start=5)
    assert (rows.tree_mask == np.tri(len(tokens), dtype=bool)).all()
    assert rows.position_ids.tolist() == list(range(5, 5 + len(tokens)))


@given(st.lists(st.integers(0, 99), min_size=1, max_size=30), st.integers(0, 3), st.integers(0, 50))
def test_a_prompt_chunk_asks_for_its_last_row_alone(tokens: list[int], draft_steps: int, start: int) -> None:
    rows = prompt_rows(tokens, (1, 0, 2), start, draft_steps)
    last = len(tokens) - 1
    assert rows.phase is Phase.PROMPT
    assert rows.logit_rows.tolist() == [last]
    assert rows.counts == tuple(int(step < draft_steps) for step in range(3))
    assert all(parents.tolist() in ([], [last]) for parents in rows.pseudo_parents)
    assert rows.position_ids[: len(tokens)].tolist() == list(range(start, start + len(tokens)))
