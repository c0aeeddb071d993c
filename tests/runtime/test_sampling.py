import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from runtime import InputError, Sampling
from runtime.several import sampling_of_answers


def identity(tokens: Any, logits: Any) -> Any:
    return logits


def test_the_defaults_are_greedy_decoding_without_options() -> None:
    assert Sampling() == Sampling(temperature=0.0, repetition_penalty=1.0, logit_bias={}, processors=[], seed=None)


def test_every_number_may_be_numpys() -> None:
    numbers: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "top_k": np.int64(3),
        "banned_tokens": np.array([1, 2]),
        "logit_bias": {np.int64(4): np.float32(2)},
        "forced_tokens": {np.int32(0): np.int64(7)},
        "seed": np.uint64(2**64 - 1),
    }
    settings = Sampling(**numbers)
    expected = Sampling(
        temperature=0.5, top_k=3, banned_tokens=(1, 2), logit_bias={4: 2.0}, forced_tokens={0: 7}, seed=2**64 - 1
    )
    assert settings == expected
    assert type(settings.top_k) is int
    assert type(settings.temperature) is float


def test_what_the_caller_does_with_its_lists_later_does_not_matter() -> None:
    bias, banned, forced, processors = {1: 2.0}, [3], {0: 4}, [identity]
    settings = Sampling(logit_bias=bias, banned_tokens=banned, forced_tokens=forced, processors=processors)
    bias.clear()
    banned.clear()
    forced.clear()
    processors.clear()
    assert settings == Sampling(logit_bias={1: 2.0}, banned_tokens=[3], forced_tokens={0: 4}, processors=[identity])


def test_nothing_of_it_can_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sampling().temperature = 1.0  # type: ignore[misc]


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        Sampling(temprature=1.0)  # type: ignore[call-arg]


NUMBERS = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
WHOLE_NUMBERS = {"top_k": 1, "min_new_tokens": 0, "seed": 0, "logprobs": 0}


def of_one(name: str, value: object) -> dict[str, Any]:
    samples = {"temperature": 1.0} if name in ("top_k", "top_p", "min_p") else {}
    return {**samples, name: value}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, "1", [1.0], 1j, math.nan, math.inf, -math.inf, 1e300, -1e300])
def test_what_is_no_number_in_range(name: str, value: object) -> None:
    least, most = NUMBERS[name]
    with pytest.raises(InputError, match=rf"{name} must be (a number )?from {least:g} to {most:g}, not "):
        Sampling(**of_one(name, value))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_allowed_up_to_the_ends_of_their_ranges_and_no_further(name: str) -> None:
    least, most = NUMBERS[name]
    assert getattr(Sampling(**of_one(name, most)), name) == most
    if name != "top_p":
        assert getattr(Sampling(**of_one(name, least)), name) == least
    for value in (least - 0.001, most + 0.001):
        with pytest.raises(InputError, match=rf"{name} must be from {least:g} to {most:g}, not {value}"):
            Sampling(**of_one(name, value))


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
@pytest.mark.parametrize("value", [True, 1.0, "1", math.nan, [1]])
def test_what_is_no_whole_number(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name} must be a whole number, not"):
        Sampling(**of_one(name, value))


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_whole_numbers_below_their_least(name: str) -> None:
    least = WHOLE_NUMBERS[name]
    assert getattr(Sampling(**of_one(name, least)), name) == least
    with pytest.raises(InputError, match=f"{name} must be at least {least}, not {least - 1}"):
        Sampling(**of_one(name, least - 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.001}, r"temperature must be 0 \(greedy\) or 0\.01 to 100, not 0\.001"),
        ({"temperature": None}, "temperature must be a number from 0 to 100, not None"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0, up to 1, not 0; top_k=1 keeps"),
        ({"seed": 2**64}, "seed must be at most 18446744073709551615, not 18446744073709551616"),
        ({"logit_bias": [(1, 2.0)]}, r"logit_bias must be a dictionary, not \[\(1, 2\.0\)\]"),
        ({"logit_bias": {"1": 2.0}}, "a token in logit_bias must be a whole number, not '1'"),
        ({"logit_bias": {-1: 2.0}}, "a token in logit_bias must be at least 0, not -1"),
        ({"logit_bias": {7: math.nan}}, "logit_bias of token 7 must be from -100 to 100, not nan"),
        ({"logit_bias": {7: -math.inf}}, "logit_bias of token 7 must be from -100 to 100, not -inf"),
        ({"logit_bias": {7: "x"}}, "logit_bias of token 7 must be a number from -100 to 100, not 'x'"),
        ({"banned_tokens": 5}, "banned_tokens must be a list of token ids, not 5"),
        ({"banned_tokens": "5"}, "banned_tokens must be a list of token ids, not '5'"),
        ({"banned_tokens": {5: 1}}, "banned_tokens must be a list of token ids, not"),
        ({"banned_tokens": [True]}, "a token in banned_tokens must be a whole number, not True"),
        ({"banned_tokens": [-2]}, "a token in banned_tokens must be at least 0, not -2"),
        ({"forced_tokens": [1]}, r"forced_tokens must be a dictionary, not \[1\]"),
        ({"forced_tokens": {0.0: 1}}, r"an index in forced_tokens must be a whole number, not 0\.0"),
        ({"forced_tokens": {-1: 1}}, "an index in forced_tokens must be at least 0, not -1"),
        ({"forced_tokens": {3: None}}, "forced token 3 must be a whole number, not None"),
        ({"forced_tokens": {3: -1}}, "forced token 3 must be at least 0, not -1"),
        ({"processors": identity}, "processors must be a list of functions, not <function"),
        (
            {"processors": [identity, None]},
            "processors must be functions of the tokens so far and the logits, not None",
        ),
        (
            {"top_k": 5},
            r"top_k has no meaning with temperature 0 \(greedy\); set a temperature above 0, or leave top_k",
        ),
        ({"top_p": 0.9}, "top_p has no meaning with temperature 0"),
        ({"min_p": 0.1, "temperature": 0}, "min_p has no meaning with temperature 0"),
        (
            {"banned_tokens": [4, 5], "forced_tokens": {2: 5}},
            "token 5 is in banned_tokens, and forced_tokens has it as new token 2; leave it out of one of them",
        ),
    ],
)
def test_options_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**arguments)


def test_a_seed_may_come_with_greedy_decoding_which_is_reproducible_anyway() -> None:
    assert Sampling(seed=5).seed == 5


@pytest.mark.parametrize("copy", [dataclasses.replace, dataclasses.asdict])
def test_settings_can_be_copied_with_the_dataclass_tools(copy: Callable[[Sampling], Any]) -> None:
    settings = Sampling(temperature=0.5, logit_bias={1: 2.0}, banned_tokens=[3])
    copied = copy(settings)
    assert (copied if isinstance(copied, Sampling) else Sampling(**copied)) == settings


def test_answers_have_seeds_one_after_the_other_and_share_what_was_checked_once() -> None:
    sampling = Sampling(temperature=1.0, seed=2**64 - 1, logit_bias={1: 2.0})
    first, second = sampling_of_answers(sampling, 2)
    assert first == sampling
    assert second == dataclasses.replace(sampling, seed=0)
    assert second is not None
    assert second.logit_bias is sampling.logit_bias
