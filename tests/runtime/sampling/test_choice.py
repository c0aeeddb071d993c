"""A choice made where the logits are is the choice that would have been made from whole logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import InputError, Sampling
from runtime.sampling.choice import ArgMax, Chosen, Race, WholeLogits
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
