"""What is kept and drawn, against the warpers of transformers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from runtime.candidates import candidates, draw, largest

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
    """Whether rounding decides what is kept."""
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
    assert candidates(logits, 3.0, top_p=1e-300)[0].tolist() == [1]
    tokens, weights = candidates(logits, 3.0, top_p=1 - 2**-53)
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


def test_logits_stay_as_they_are_and_may_be_read_only() -> None:
    logits = np.linspace(-3, 3, 200, dtype=np.float32)
    logits.setflags(write=False)
    options = {"top_k": 20, "top_p": 0.7, "min_p": 0.1}
    for count in range(4):
        for names in combinations(options, count):
            candidates(logits, 3.0, **{name: options[name] for name in names}, out=np.empty_like(logits))
    np.testing.assert_array_equal(logits, np.linspace(-3, 3, 200, dtype=np.float32))


weight_rows = (
    st.lists(st.just(0.0) | st.floats(0.0, 1.0, width=32), min_size=1, max_size=300)
    .map(lambda row: np.array(row, dtype=np.float32))
    .filter(lambda row: row.sum() > 0)
)
uniforms = st.floats(0.0, 1.0, exclude_max=True) | st.sampled_from([0.0, 1 - 2**-53])


@given(weight_rows, uniforms)
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(weights: np.ndarray, uniform: float) -> None:
    index = draw(weights, uniform)
    ends = weights.cumsum(dtype=np.float64)
    assert weights[index] > 0
    place = uniform * ends[-1]
    slack = 1e-12 * ends[-1]
    assert (ends[index - 1] if index else 0.0) - slack <= place <= ends[index] + slack


@given(weight_rows)
def test_the_ends_of_the_unit_interval_fall_on_the_first_and_last_token_with_weight(weights: np.ndarray) -> None:
    present = np.flatnonzero(weights)
    assert draw(weights, 0.0) == present[0]
    last = draw(weights, 1 - 2**-53)
    assert weights[last:].sum(dtype=np.float64) >= 2**-53 * weights.sum(dtype=np.float64)
    assert weights[last + 1 :].sum(dtype=np.float64) <= 1e-12 * weights.sum(dtype=np.float64)


def test_the_rounding_of_sums_never_leads_past_the_last_token_with_weight() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        weights = np.exp(rng.standard_normal(rng.integers(2, 200)) * 10).astype(np.float32)
        assert draw(weights, 1 - 2**-53) < len(weights)
        assert draw(np.append(weights, np.zeros(100, dtype=np.float32)), 1 - 2**-53) < len(weights)


def test_rounding_of_logits_moves_a_draw_at_the_border_between_two_tokens_only() -> None:
    rng = np.random.default_rng(0)
    changed = 0
    for _ in range(2000):
        logits = rng.standard_normal(1000).astype(np.float32)
        other = logits + rng.uniform(-1e-6, 1e-6, 1000).astype(np.float32)
        uniform = rng.random()
        drawn = [draw(candidates(row, float(row.max()))[1], uniform) for row in (logits, other)]
        changed += drawn[0] != drawn[1]
    assert changed <= 2
