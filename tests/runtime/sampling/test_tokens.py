import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.sampling.tokens import TokensSoFar

tokens_ = st.lists(st.integers(0, 5), max_size=8)


@given(tokens_, st.slices(8), tokens_)
def test_a_view_reads_as_the_list_does(tokens: list[int], part: slice, other: list[int]) -> None:
    view = TokensSoFar(tokens)
    assert isinstance(view, Sequence)
    assert len(view) == len(tokens)
    assert bool(view) == bool(tokens)
    assert list(view) == tokens
    assert list(reversed(view)) == tokens[::-1]
    assert view[part] == tokens[part]
    assert repr(view) == repr(tokens)
    assert (view == other) == (other == view) == (tokens == other)
    assert view == TokensSoFar(list(tokens)) == tuple(tokens)
    assert view + other == tokens + other
    assert other + view == other + tokens
    assert [view.count(token) for token in range(6)] == [tokens.count(token) for token in range(6)]
    assert [token in view for token in range(6)] == [token in tokens for token in range(6)]
    for index in range(-len(tokens), len(tokens)):
        assert view[index] == tokens[index]
        assert view.index(tokens[index]) == tokens.index(tokens[index])
    np.testing.assert_array_equal(np.array(view, dtype=np.int32), np.array(tokens, dtype=np.int32))


def test_a_view_grows_with_its_list() -> None:
    tokens = [1, 2]
    view = TokensSoFar(tokens)
    tokens.append(3)
    assert view == [1, 2, 3]


def test_nothing_of_a_view_changes_its_list() -> None:
    tokens = [1, 2, 3]
    view: Any = TokensSoFar(tokens)
    for change in ("append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"):
        assert not hasattr(view, change)
    with pytest.raises(TypeError):
        view[0] = 9
    with pytest.raises(TypeError):
        del view[0]
    with pytest.raises(AttributeError):
        view.more = 9
    view[:].append(9)
    np.asarray(view)[0] = 9
    copied = copy.copy(view)
    copied += [9]
    assert tokens == [1, 2, 3]


def test_a_view_is_no_key() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(TokensSoFar([1]))


def test_what_is_no_sequence_is_not_equal() -> None:
    assert TokensSoFar([1]) != 1
    assert TokensSoFar([]) != ""
    assert (np.array([1, 2]) == TokensSoFar([1, 3])).tolist() == [True, False]
