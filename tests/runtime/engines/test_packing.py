"""Rows of several requests one behind the other: a drawn example, then properties."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.drafting.best_first import likely_ends
from runtime.engines.packing import pack
from runtime.rows import Rows, lay_out
from runtime.tree import Tree, chain
from tests.strategies import trees

JOIN_ORDERS = st.sampled_from([(0, 1), (1, 0)])


def test_two_requests_of_which_one_has_a_pseudo_row() -> None:
    nothing = np.empty(0, dtype=np.int64)
    first = lay_out(chain([5, 6]), (nothing,), (0,), 10)
    second = lay_out(chain([7]), (np.array([0]),), (0,), 20)
    found = pack([first, second], [10, 20], (0,))
    expected = {
        "input_ids": [[5, 6, 7]],
        "position_ids": [[10, 11, 20, 21]],
        "pseudo_parent_1": [[2]],
        "logit_rows": [[0, 1, 2]],
        "cache_length": [10, 20],
        "slot_rows": [[0, 1], [2, 3]],
        "row_slots": [0, 0, 1, 1],
        "row_places": [0, 1, 0, 1],
    }
    assert {name: value.tolist() for name, value in found.values.items() if name != "tree_mask"} == expected
    drawn = ["T...", "TT..", "..T.", "..TT"]
    assert ["".join("T" if seen else "." for seen in row) for row in found.values["tree_mask"][0]] == drawn
    assert (found.logit_rows, found.pseudo_rows, found.written) == (3, 1, 2)
    assert found.logits == (slice(0, 2), slice(2, 3))
    assert [own.tolist() for own in found.pseudo] == [[], [0]]


@given(
    st.lists(
        st.tuples(trees(max_rows=9), st.tuples(*[st.integers(0, 9)] * 2), st.integers(0, 9)), min_size=2, max_size=5
    ),
    JOIN_ORDERS,
)
def test_no_row_is_lost_or_added_and_each_request_sees_its_own_alone(
    requests: list[tuple[Tree, tuple[int, int], int]], join_order: tuple[int, int]
) -> None:
    rows = [lay_out(tree, likely_ends(tree, counts), join_order, start) for tree, counts, start in requests]
    found = pack(rows, [start for *_, start in requests], join_order)
    if all(len(one.position_ids) == 1 for one in rows):
        assert found.values["input_ids"].shape == (len(rows), 1)
        return
    values = {name: value[0] for name, value in found.values.items()}
    slot_rows = found.values["slot_rows"]
    assert found.written == slot_rows.shape[1] == max(len(one.position_ids) for one in rows)
    used = []
    trees_end = sum(len(one.input_ids) for one in rows)
    for slot, one in enumerate(rows):
        own = slot_rows[slot][slot_rows[slot] >= 0]
        assert (np.diff(own) > 0).all()
        assert (slot_rows[slot, len(own) :] == -1).all()
        used += own.tolist()
        np.testing.assert_array_equal(found.values["row_slots"][own], slot)
        np.testing.assert_array_equal(found.values["row_places"][own], np.arange(len(own)))
        np.testing.assert_array_equal(values["tree_mask"][np.ix_(own, own)], one.tree_mask)
        others = np.setdiff1d(np.arange(len(values["position_ids"])), own)
        assert not values["tree_mask"][np.ix_(own, others)].any()
        np.testing.assert_array_equal(values["position_ids"][own], one.position_ids)
        size = len(one.input_ids)
        np.testing.assert_array_equal(values["input_ids"][own[:size]], one.input_ids)
        np.testing.assert_array_equal(values["logit_rows"][found.logits[slot]], own[one.logit_rows])
        np.testing.assert_array_equal(found.pseudo[slot] + trees_end, own[size:])
    assert sorted(used) == list(range(len(values["position_ids"])))
    # The pseudo rows of a step are next to each other, and those of all requests are under their parents.
    end = trees_end
    for step in join_order:
        parents = values[f"pseudo_parent_{step + 1}"]
        expected = [parent + first for one, first in _firsts(rows) for parent in one.pseudo_parents[step].tolist()]
        assert parents.tolist() == expected
        end += len(parents)
    assert end == len(values["position_ids"])
    assert found.pseudo_rows == end - trees_end


def _firsts(rows: list[Rows]) -> list[tuple[Rows, int]]:
    ends = np.cumsum([0, *(len(one.input_ids) for one in rows)]).tolist()
    return list(zip(rows, ends, strict=False))
