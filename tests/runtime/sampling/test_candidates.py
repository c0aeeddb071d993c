"""The tokens that are kept and drawn, against the warpers of transformers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from runtime.sampling.candidates import BLOCK, candidates, largest, sum_of_weights

# transformers computes in float32 what lies on the border of a top-p or min-p set.
ROUNDING = 1e-5
COARSE = st.integers(-6, 6).map(float)
EXTREME = st.sampled_from([-np.inf, -65504.0, -1e4, 0.0, 1e4, 65504.0])
FINE = st.floats(-30, 30, width=32)


@st.composite
def logit_rows(draw: st.DrawFn) -> np.ndarray:
    """Rows with many equals, of extremes, of any numbers, or of all; at least one is finite."""
    numbers = draw(st.sampled_from([COARSE, EXTREME, FINE, COARSE | EXTREME | FINE]))
    row = np.array(draw(st.lists(numbers, min_size=1, max_size=150)), dtype=np.float32)
    assume(np.isfinite(row).any())
    return row


def by_transformers(
    logits: np.ndarray, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens kept, and all probabilities."""
    warpers = LogitsProcessorList()
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p))
    scores = warpers(None, torch.from_numpy(logits)[None])[0]
    probabilities = scores.double().softmax(dim=-1).numpy()
    return np.flatnonzero(probabilities > 0), probabilities


def on_a_border(logits: np.ndarray, top_k: int | None, top_p: float | None, min_p: float | None) -> bool:
    """Return whether rounding decides what is kept."""
    scores = np.sort(logits.astype(np.float64))[::-1]
    if top_k is not None:
        scores = scores[scores >= scores[min(top_k, len(scores)) - 1]]
    weights = np.exp(scores - scores[0])
    before = np.concatenate([[0.0], weights.cumsum() / weights.sum()])
    near_top_p = top_p is not None and top_p < 1 and (np.abs(before - top_p) < ROUNDING).any()
    near_min_p = min_p is not None and (np.abs(weights - min_p) < ROUNDING * min_p).any()
    # In float32 such weights vanish, here or there.
    vanishing = ((weights > 0) & (weights < 1e-30)).any()
    return bool(near_top_p or near_min_p or vanishing)


def assert_kept_as_by_transformers(
    logits: np.ndarray, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    found, weights = candidates(logits, float(logits.max()), top_k=top_k, top_p=top_p, min_p=min_p)
    tokens = np.arange(len(logits)) if found is None else found
    assert (np.diff(tokens) > 0).all()
    expected, probabilities = by_transformers(logits, top_k, top_p, min_p)
    # Which of several equals are kept is left to a sort that is not stable: only how many is compared.
    np.testing.assert_array_equal(np.sort(logits[tokens[weights > 0]]), np.sort(logits[expected]))
    np.testing.assert_allclose(
        np.sort(weights[weights > 0] / weights.sum(dtype=np.float64)),
        np.sort(probabilities[expected]),
        rtol=1e-4,
        atol=1e-7,
    )


top_ks = st.integers(1, 160)
top_ps = st.floats(0.001, 1.0)
min_ps = st.floats(0.0, 1.0)


@given(logit_rows(), top_ks)
def test_top_k_keeps_what_transformers_keeps(logits: np.ndarray, top_k: int) -> None:
    assume(not on_a_border(logits, top_k, None, None))
    assert_kept_as_by_transformers(logits, top_k, None, None)


@given(logit_rows(), top_ps)
def test_top_p_keeps_what_transformers_keeps(logits: np.ndarray, top_p: float) -> None:
    assume(not on_a_border(logits, None, top_p, None))
    assert_kept_as_by_transformers(logits, None, top_p, None)


@given(logit_rows(), min_ps)
def test_min_p_keeps_what_transformers_keeps(logits: np.ndarray, min_p: float) -> None:
    assume(not on_a_border(logits, None, None, min_p))
    assert_kept_as_by_transformers(logits, None, None, min_p)


@given(logit_rows(), st.none() | top_ks, st.none() | top_ps, st.none() | min_ps)
@example(np.zeros(9, dtype=np.float32), 3, 0.7, 0.5)
def test_together_they_keep_what_transformers_keeps(
    logits: np.ndarray, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    assume(not on_a_border(logits, top_k, top_p, min_p))
    assert_kept_as_by_transformers(logits, top_k, top_p, min_p)


@pytest.mark.parametrize("top_p", [0.125, 0.25, 0.5, 0.75])
def test_top_p_ends_with_the_token_that_reaches_it_and_keeps_the_larger_of_equal_tokens(top_p: float) -> None:
    logits = np.zeros(8, dtype=np.float32)
    tokens, _ = candidates(logits, 0.0, top_p=top_p)
    assert tokens is not None
    assert tokens.tolist() == list(range(8 - int(8 * top_p), 8))
    np.testing.assert_array_equal(tokens, by_transformers(logits, None, top_p, None)[0])


def test_a_tiny_top_p_keeps_one_token_and_one_of_almost_1_keeps_all_that_have_weight() -> None:
    logits = np.array([1.0, 3.0, -np.inf, 2.0], dtype=np.float32)
    tokens, _ = candidates(logits, 3.0, top_p=1e-300)
    assert tokens is not None
    assert tokens.tolist() == [1]
    tokens, weights = candidates(logits, 3.0, top_p=1 - 2**-53)
    assert tokens is not None
    assert tokens[weights > 0].tolist() == [0, 1, 3]


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (50, None, None),
        (3000, None, None),
        (40000, 0.9, None),
        (None, 0.95, None),
        (None, 0.999, 0.01),
        (None, None, 0.1),
    ],
)
def test_a_large_vocabulary_is_kept_as_by_transformers(
    spread: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    logits = (np.random.default_rng(3).standard_normal(49152) * spread).astype(np.float32)
    expected, probabilities = by_transformers(logits, top_k, top_p, min_p)
    tokens, weights = candidates(logits, float(logits.max()), top_k=top_k, top_p=top_p, min_p=min_p)
    assert tokens is not None
    # Summed up in float32, a large vocabulary's border moves by a few tokens.
    other = np.setxor1d(tokens, expected)
    assert len(other) <= len(expected) / 500
    assert probabilities[other].sum() < 0.001
    both = np.isin(tokens, expected)
    np.testing.assert_allclose((weights / weights.sum(dtype=np.float64))[both], probabilities[tokens][both], rtol=2e-3)


@given(logit_rows(), st.integers(1, 150))
def test_the_largest_are_found_with_their_equals(logits: np.ndarray, count: int) -> None:
    assume(count <= len(logits))
    bound = np.sort(logits)[-count]
    np.testing.assert_array_equal(largest(logits, count), np.flatnonzero(logits >= bound))


@given(
    st.integers(1, 3 * BLOCK) | st.integers(4 * BLOCK, 40 * BLOCK),
    st.integers(1, 70),
    st.lists(COARSE | EXTREME | FINE, min_size=1, max_size=9),
    st.integers(0, 9),
    st.integers(0, 2**32 - 1),
)
def test_the_largest_of_a_large_vocabulary_are_found_wherever_they_are(
    size: int, count: int, numbers: list[float], apart: int, seed: int
) -> None:
    # Few different numbers, so that whole groups are equal, and some apart from the others, the last ones too: those
    # that are left over when groups are made.
    rng = np.random.default_rng(seed)
    logits = rng.choice(np.array(numbers, dtype=np.float32), size)
    logits[rng.integers(max(0, size - 5), size)] += 1.0
    logits[rng.integers(0, size, apart)] += rng.integers(1, 9, apart).astype(np.float32)
    count = min(count, size)
    bound = np.sort(logits)[-count]
    np.testing.assert_array_equal(largest(logits, count), np.flatnonzero(logits >= bound))


@given(st.integers(1, 40 * BLOCK), st.sampled_from([0.0, 1.0, 10.0, 1000.0]), st.integers(0, 2**32 - 1))
def test_the_sum_of_weights_is_that_in_double_precision_but_for_rounding(size: int, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(size) * spread).astype(np.float32)
    logits[rng.integers(0, size)] = -np.inf if size > 1 else 3.0
    top = float(logits.max())
    expected = float(np.exp(logits.astype(np.float64) - top).sum())
    before = logits.copy()
    assert sum_of_weights(logits, top) == pytest.approx(expected, rel=2e-5)
    np.testing.assert_array_equal(logits, before)


def test_each_thread_sums_in_memory_of_its_own() -> None:
    rows = [np.linspace(-spread, 0.0, 30_000, dtype=np.float32) for spread in (1.0, 9.0)]
    alone = [sum_of_weights(row, 0.0) for row in rows]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(100):
            assert list(pool.map(lambda row: sum_of_weights(row, 0.0), rows)) == alone


def test_logits_stay_as_they_are_and_may_be_read_only() -> None:
    logits = np.linspace(-3, 3, 200, dtype=np.float32)
    logits.setflags(write=False)
    options: dict[str, Any] = {"top_k": 20, "top_p": 0.7, "min_p": 0.1}
    for count in range(4):
        for names in combinations(options, count):
            candidates(logits, 3.0, **{name: options[name] for name in names}, out=np.empty_like(logits))
    np.testing.assert_array_equal(logits, np.linspace(-3, 3, 200, dtype=np.float32))
