from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.sampling.candidates import candidates
from runtime.sampling.noise import Noise
from tests.statistics import is_uniform, largest_chi_square

seeds = st.integers(0, 2**64 - 1)
weight_rows = (
    st.lists(st.just(0.0) | st.floats(0.0, 1.0, width=32), min_size=1, max_size=300)
    .map(lambda row: np.array(row, dtype=np.float32))
    .filter(lambda row: row.max() > 0)
)


@given(seeds, st.integers(0, 10**6), weight_rows)
def test_the_first_is_the_one_with_the_least_wait_for_its_weight(seed: int, position: int, weights: np.ndarray) -> None:
    tokens = np.arange(len(weights)) * 3
    noise = Noise(seed, position)
    found = noise.first(position, tokens, weights)
    assert weights[found] > 0
    with np.errstate(divide="ignore", over="ignore"):
        finish = noise.waits(position, tokens) / weights
    assert finish[found] == finish.min()


@given(seeds, st.integers(0, 1000), st.lists(st.integers(0, 50_000), min_size=1, max_size=20), st.integers(0, 50))
def test_a_number_depends_on_seed_position_and_token_alone(
    seed: int, position: int, tokens: list[int], before: int
) -> None:
    found = Noise(seed, position).uniforms(position, np.array(tokens))
    # Wherever the noise began, whatever was asked before, whichever tokens beside it.
    other = Noise(seed, max(0, position - before))
    other.uniforms(position + before, np.arange(5))
    assert found.tolist() == other.uniforms(position, np.array(tokens)).tolist()
    assert found[0] == other.uniforms(position, np.array(tokens[:1]))[0]
    assert ((found > 0) & (found < 1)).all()


@given(seeds, st.integers(0, 10**6), st.integers(1, 3000), st.floats(-0.5, 1.5) | st.sampled_from([0.999, 1 - 2**-31]))
def test_no_token_with_a_large_number_is_missed(seed: int, position: int, vocab_size: int, least: float) -> None:
    noise = Noise(seed, position)
    numbers = noise.uniforms(position, np.arange(vocab_size))
    found = noise.of_all(position, vocab_size).reaching(least)
    assert (np.diff(found) > 0).all()
    assert set(np.flatnonzero(numbers >= least).tolist()) <= set(found.tolist())
    assert (numbers[found] > least - 2**-29).all()


@given(seeds, st.integers(0, 10**6), st.lists(st.integers(0, 2999), max_size=20), st.integers(0, 9))
def test_the_noise_of_all_tokens_has_the_numbers_of_each(
    seed: int, position: int, tokens: list[int], later: int
) -> None:
    chosen, noise = np.array(tokens, dtype=np.int64), Noise(seed, position)
    for place in (position + later, position):
        whole = noise.of_all(place, 3000)
        for _ in range(2):
            assert whole.uniforms(chosen).tolist() == noise.uniforms(place, chosen).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_numbers_are_uniform_and_independent_over_tokens_positions_and_seeds(seed: int) -> None:
    noise = Noise(seed, 0)
    table = np.array([noise.uniforms(position, np.arange(2000)) for position in range(200)])
    assert all(is_uniform(sample) for sample in (table.ravel(), table[:, 7], table[7]))
    for one, other in ((table[:-1], table[1:]), (table[:, :-1], table[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.01
    neighbour = np.array([Noise((seed + 1) % 2**64, 0).uniforms(0, np.arange(2000))])
    assert abs(np.corrcoef(table[0], neighbour[0])[0, 1]) < 0.1


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_tokens_are_drawn_in_proportion_to_their_weights(spread: float) -> None:
    weights = np.exp(np.random.default_rng(0).standard_normal(12) * spread).astype(np.float32)
    noise, tokens = Noise(3, 0), np.arange(12)
    drawn = np.bincount([noise.first(position, tokens, weights) for position in range(20_000)], minlength=12)
    expected = weights / weights.sum() * drawn.sum()
    often = expected >= 5
    observed, wanted = (np.append(counts[often], counts[~often].sum()) for counts in (drawn, expected))
    statistic = float(((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum())
    assert statistic < largest_chi_square(len(observed) - 1)


def test_similar_distributions_mostly_have_the_same_winner() -> None:
    rng = np.random.default_rng(1)
    same = 0
    for position in range(500):
        logits = rng.standard_normal(50) * 2
        one, other = (np.exp(logits + rng.normal(0, 0.1, 50)) for _ in range(2))
        noise = Noise(9, position)
        same += noise.first(position, np.arange(50), one) == noise.first(position, np.arange(50), other)
    # Their total variation distance is about 0.05.
    assert same > 430


def test_rounding_of_logits_hardly_ever_changes_a_draw() -> None:
    rng = np.random.default_rng(0)
    changed = 0
    for position in range(2000):
        logits = rng.standard_normal(1000).astype(np.float32)
        other = logits + rng.uniform(-1e-6, 1e-6, 1000).astype(np.float32)
        noise = Noise(5, position)
        drawn = [
            noise.first(position, np.arange(1000), candidates(row, float(row.max()))[1]) for row in (logits, other)
        ]
        changed += drawn[0] != drawn[1]
    assert changed <= 2
