from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.drafting.drafts import DraftStep, most_probable
from runtime.drafting.foresight import USUAL, Foresight, StepForesight, foreseen
from runtime.sampling.noise import Noise

VOCAB = 40
numbers = st.builds(StepForesight, st.floats(0.1, 2.0), st.floats(0.0, 1.5), st.floats(0.0, 100.0))


def drafted(seed: int, count: int = VOCAB) -> DraftStep:
    return most_probable((np.random.default_rng(seed).standard_normal(VOCAB) * 3).astype(np.float32), count)


def of_step(power: float, trust: float = 0.5, rest: float = 2.0) -> dict[str, float]:
    return {"power": power, "trust": trust, "rest": rest, "log_loss": 1.2}


def fitted(*by_temperature: tuple[float, list[dict[str, float]]]) -> dict[str, Any]:
    return {"foresight": [{"temperature": at, "steps": steps} for at, steps in by_temperature]}


@given(st.integers(0, 1000), numbers, st.integers(1, VOCAB))
def test_the_best_by_probability_and_wait_are_kept(seed: int, how: StepForesight, count: int) -> None:
    step = drafted(seed)
    waits = np.random.default_rng(seed).exponential(size=VOCAB)
    found = foreseen(step, waits, how, count)
    assert len(set(found.tokens.tolist())) == len(found.tokens) == count
    assert (np.diff(found.probabilities) <= 0).all()
    assert found.probabilities.sum() <= 1 + 1e-9
    worth = dict(zip(step.tokens.tolist(), step.probabilities**how.power * waits**-how.trust, strict=True))
    kept = [worth[token] for token in found.tokens.tolist()]
    assert min(kept) >= max((worth[token] for token in worth if token not in found.tokens), default=0.0)


@given(st.integers(0, 1000), st.integers(1, VOCAB))
def test_without_trust_in_the_race_candidates_are_as_probable_as_before(seed: int, count: int) -> None:
    step = drafted(seed, count)
    waits = np.random.default_rng(seed).exponential(size=count)
    found = foreseen(step, waits, StepForesight(1.0, 0.0, 1.0), count)
    assert found.tokens.tolist() == step.tokens.tolist()
    np.testing.assert_allclose(found.probabilities, step.probabilities, rtol=1e-6)


@given(st.integers(0, 1000), st.integers(0, 10**6))
def test_right_drafts_foresee_the_draw(seed: int, position: int) -> None:
    step = drafted(seed)
    noise = Noise(seed, position)
    found = foreseen(step, noise.waits(position, step.tokens), StepForesight(1.0, 1.0, 1.0), 1)
    assert found.tokens[0] == step.tokens[noise.first(position, step.tokens, step.probabilities)]


def test_a_larger_rest_makes_all_candidates_less_probable() -> None:
    step, waits = drafted(3, 5), np.ones(5)
    few, many = (foreseen(step, waits, StepForesight(1.0, 0.5, rest), 5).probabilities for rest in (1.0, 20.0))
    assert (many < few).all()


def test_without_foresight_of_its_own_a_file_has_the_usual_one() -> None:
    assert Foresight.of({}).at(0.8) == USUAL


def test_between_two_temperatures_numbers_lie_between_theirs_and_beyond_them_they_stay() -> None:
    found = Foresight.of(fitted((0.5, [of_step(0.4)]), (1.0, [of_step(0.8, 0.7, 4.0)])))
    between = found.at(0.75)[0]
    assert [between.power, between.trust, between.rest] == pytest.approx([0.6, 0.6, 3.0])
    assert found.at(0.1) == (StepForesight(0.4, 0.5, 2.0),)
    assert found.at(0.5) == (StepForesight(0.4, 0.5, 2.0),)
    assert found.at(3.0) == (StepForesight(0.8, 0.7, 4.0),)


@pytest.mark.parametrize(
    ("acceptance", "said"),
    [
        ({"foresight": 3}, "array"),
        (fitted((0.0, [of_step(1.0)])), "temperature"),
        (fitted((1.0, [])), "steps"),
        (fitted((1.0, [of_step(-1.0)])), "power"),
        (fitted((1.0, [of_step(float("nan"))])), "power"),
        (fitted((1.0, [{"power": 1.0}])), "trust"),
        (fitted((1.0, [of_step(1.0)]), (0.5, [of_step(1.0)])), "do not rise"),
    ],
)
def test_what_cannot_have_been_fitted_is_refused(acceptance: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"the foresight of drafts cannot be: .*{said}"):
        Foresight.of(acceptance)
