import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.bindings import GraphDims
from runtime.engines.host_cache import BLOCK, KeyValueCache

DIMS = GraphDims(3, 4, 2, 5, 20, 50, (2,))


def new_rows(rng: np.random.Generator, rows: int) -> list[np.ndarray]:
    return [rng.standard_normal((2, rows, 5)).astype(np.float32) for _ in range(DIMS.num_layers)]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=8), st.integers(0, 1000))
def test_the_cache_holds_accepted_rows_in_order_and_nothing_else(passes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = KeyValueCache(DIMS)
    expected = [np.empty((2, 0, 5), dtype=np.float32) for _ in range(DIMS.num_layers)]
    for rows in passes:
        keys, values = new_rows(rng, rows), new_rows(rng, rows)
        accepted = sorted(rng.permutation(rows)[: rng.integers(1, rows + 1)].tolist())
        cache.append(keys, values, accepted)
        expected = [np.concatenate([e, k[:, accepted]], axis=1) for e, k in zip(expected, keys, strict=True)]
    assert cache.length == expected[0].shape[1] <= cache.capacity
    for layer in range(DIMS.num_layers):
        np.testing.assert_array_equal(cache.keys[layer, 0, :, : cache.length], expected[layer])
        assert not cache.keys[layer, :, :, cache.length :].any()


@given(st.integers(0, 150), st.integers(0, 150), st.integers(0, 150), st.integers(0, 90))
def test_copied_rows_are_the_first_ones_and_independent_of_where_they_came_from(
    length: int, kept: int, taken: int, more: int
) -> None:
    kept, taken = min(kept, length), min(taken, kept, length)
    rng = np.random.default_rng(0)
    cache = KeyValueCache(DIMS)
    keys, values = new_rows(rng, length + more), new_rows(rng, length + more)
    cache.append(keys, values, range(length))
    copies = cache.first(kept)
    # What the text goes on with is no part of them.
    cache.append(keys, values, range(length, length + more))
    cache.keys[:], cache.values[:] = -1, -1
    taker = KeyValueCache(DIMS)
    taker.take(copies, taken)
    taker.append(keys, values, range(taken, length + more))
    assert (copies.length, taker.length) == (kept, length + more)
    for found, count in ((copies, kept), (taker, length + more)):
        for layer in range(DIMS.num_layers):
            np.testing.assert_array_equal(found.keys[layer, 0, :, :count], keys[layer][:, :count])
            np.testing.assert_array_equal(found.values[layer, 0, :, :count], values[layer][:, :count])


def test_of_a_request_that_failed_nothing_is_appended() -> None:
    cache = KeyValueCache(DIMS)
    rng = np.random.default_rng(0)
    cache.append(new_rows(rng, 3), new_rows(rng, 3), [0, 2])
    before = cache.keys.copy()
    cache.append(new_rows(rng, 3), new_rows(rng, 3), ())
    assert cache.length == 2
    np.testing.assert_array_equal(cache.keys, before)


def test_an_engine_reads_little_more_than_the_valid_rows() -> None:
    cache = KeyValueCache(DIMS)
    rng = np.random.default_rng(0)
    grown = 0
    for _ in range(2000):
        before = cache.capacity
        cache.append(new_rows(rng, 1), new_rows(rng, 1), [0])
        grown += cache.capacity != before
        assert cache.capacity <= max(cache.length * 9 / 8, cache.length) + BLOCK
    assert grown < 25
    assert cache.keys[0].flags.c_contiguous
