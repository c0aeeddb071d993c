"""A choice made where the logits are is the choice that would have been made from whole logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime import InputError, Sampling
from runtime.sampling.candidates import candidates
from runtime.sampling.choice import DEPTH, MOST_NEAR, ArgMax, Chosen, Race, WholeLogits
from runtime.sampling.noise import Noise
from runtime.sampling.sampler import Sampler

VOCAB = 12
draws = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.1, 0.8, 1.0, 1.7])},
    optional={
        "top_k": st.integers(1, VOCAB + 1),
        "top_p": st.floats(0.05, 0.999),
        "min_p": st.floats(0.0, 1.0),
    },
)


@given(draws | st.just({}), st.integers(0, 1000), st.integers(1, 9))
def test_what_a_sampler_asks_for_gives_the_token_of_whole_logits(
    options: dict[str, Any], seed: int, prompt_length: int
) -> None:
    rows = np.random.default_rng(seed).standard_normal((8, VOCAB)).astype(np.float32)
    asked, whole = (Sampler(Sampling(**options, seed=seed), [0] * prompt_length, VOCAB) for _ in range(2))
    assert isinstance(asked.wanted, Race if options else ArgMax)
    for position, logits in enumerate(rows, start=prompt_length):
        found = asked.wanted.choose(logits, position)
        assert isinstance(found, Chosen)
        assert asked(found) == whole(logits)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": {3: 1.0}},
        {"banned_tokens": [3]},
        {"forced_tokens": {0: 3}},
        {"min_new_tokens": 2},
        {"processors": [lambda tokens, logits: logits]},
        {"logprobs": 1},
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_whole_logits_are_asked_for_where_a_choice_depends_on_more(options: dict[str, Any], temperature: float) -> None:
    sampler = Sampler(Sampling(**options, temperature=temperature), [1], VOCAB)
    assert isinstance(sampler.wanted, WholeLogits)
    logits = np.arange(VOCAB, dtype=np.float32)
    assert sampler.wanted.choose(logits, 1) is logits


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
def test_a_row_that_overflowed_is_an_error_wherever_the_choice_is_made(value: float, temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature), [1], VOCAB)
    with pytest.raises(InputError, match=r"no token is left|its numbers overflow"):
        sampler(sampler.wanted.choose(np.full(VOCAB, value, dtype=np.float32), 1))


def whole_race(
    logits: NDArray[np.float32], seed: int, position: int, temperature: float, min_p: float | None = None
) -> tuple[int, float]:
    """The race as it is defined: weights and waits of all tokens."""
    with np.errstate(over="ignore"):
        tempered = np.divide(logits, np.float32(temperature), dtype=np.float32)
        top = float(tempered.max())
        tokens, weights = candidates(tempered, top, min_p=min_p)
    if tokens is None:
        tokens = np.arange(len(logits))
    return int(tokens[Noise(seed, position).first(position, tokens, weights)]), top


LARGEST = float(np.finfo(np.float32).max)
hostile_logits = st.sampled_from(
    [-np.inf, -LARGEST, LARGEST, -1e30, 1e30, -65504.0, 65504.0, 1e8, 16777216.0, 16777218.0, 0.0, -0.0, 1e-45, 10.0]
)
near_logits = st.integers(-12, 12).map(float) | st.floats(-30, 30, width=32)


@st.composite
def hostile_rows(draw: st.DrawFn) -> np.ndarray:
    """Rows of few different numbers, so that many are equal; at least one is finite."""
    numbers = draw(
        st.lists(draw(st.sampled_from([near_logits, hostile_logits, near_logits | hostile_logits])), min_size=1)
    )
    size = draw(st.integers(1, 60) | st.integers(2 * MOST_NEAR, 3 * MOST_NEAR))
    row = np.random.default_rng(draw(st.integers(0, 99))).choice(np.array(numbers, dtype=np.float32), size)
    row[draw(st.integers(0, size - 1))] = draw(near_logits | hostile_logits.filter(np.isfinite))
    return row


@given(
    hostile_rows(),
    st.integers(0, 2**64 - 1),
    st.integers(0, 1000),
    st.sampled_from([0.01, 0.3, 0.8, 1.0, 1.7, 100.0]),
    st.none() | st.floats(0.0, 1.0) | st.sampled_from([1e-46, 1e-5, 4.54e-5]),
)
def test_the_race_of_those_that_have_a_chance_has_the_winner_of_the_race_of_all(
    logits: np.ndarray, seed: int, position: int, temperature: float, min_p: float | None
) -> None:
    race = Race(Noise(seed, position), len(logits), temperature, min_p=min_p)
    with np.errstate(over="ignore"):
        if not np.isfinite(logits.max() / np.float32(temperature)):
            return
        found = race.choose(logits, position)
    assert (found.token, found.top) == whole_race(logits, seed, position, temperature, min_p)


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 4.0, 8.0])
def test_in_a_large_vocabulary_the_winner_is_that_of_all(spread: float) -> None:
    rows = np.random.default_rng(5).standard_normal((100, 20_000)).astype(np.float32) * np.float32(spread)
    race = Race(Noise(7, 0), 20_000, 0.9)
    for position, logits in enumerate(rows):
        found = race.choose(logits, position)
        assert (found.token, found.top) == whole_race(logits, 7, position, 0.9)


@pytest.mark.parametrize("depth", [DEPTH - 0.5, DEPTH, DEPTH + 0.5, DEPTH + 2.0])
def test_many_unlikely_tokens_win_as_often_as_they_should(depth: float) -> None:
    size, count = 100_000, 100
    logits = np.random.default_rng(2).normal(-depth, 0.2, size).astype(np.float32)
    logits[77] = 0.0
    race = Race(Noise(7, 0), size, 1.0)
    won = 0
    for position in range(count):
        found = race.choose(logits, position)
        assert (found.token, found.top) == whole_race(logits, 7, position, 1.0)
        won += found.token != 77
    weight = float(np.exp(logits.astype(np.float64)).sum()) - 1.0
    expected = count * weight / (1.0 + weight)
    assert abs(won - expected) < 4 * np.sqrt(expected)
