"""What an error repeats of something foreign is short, in one line, and can be printed."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import pytest

from runtime import InputError, Sampling
from runtime.checks import LARGEST, number, whole
from runtime.errors import LONGEST_CAUSE, one_line, shown

HUGE = 10**5000


class Rude:
    def __repr__(self) -> NoReturn:
        raise KeyError("no")


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        ("it is damaged", "it is damaged"),
        ("\n first line \nsecond line", "first line"),
        (ValueError(""), "ValueError"),
        (KeyError("a"), "'a'"),
        ("a\x1b[2Jb\x00c\u202ed\ud800", "a\ufffd[2Jb\ufffdc\ufffdd\ufffd"),
        ("before\u2028after", "before"),
        ("x" * 1000, "x" * LONGEST_CAUSE),
        ("漢字 é 🫖", "漢字 é 🫖"),
    ],
)
def test_a_cause_is_told_in_one_line(cause: object, told: str) -> None:
    assert one_line(cause) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "None"),
        (5, "5"),
        (-1.5, "-1.5"),
        ("a\n", r"'a\n'"),
        (["a", 1], "['a', 1]"),
        ({"a": (1, 2)}, "{'a': (1, 2)}"),
        (HUGE, "a value of type int"),
        ([HUGE], "a value of type list"),
    ],
    ids=map(str, range(8)),
)
def test_a_value_is_shown_as_python_writes_it(value: object, told: str) -> None:
    assert shown(value) == told


@pytest.mark.parametrize(
    "value",
    ["a" * 10**6, [0] * 10**6, {n: n for n in range(10**5)}, np.zeros(10**6), 10**4000, Rude(), [[[[[[]]]]]] * 99],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_shown_short(value: object) -> None:
    told = shown(value)
    assert len(told) <= LONGEST_CAUSE
    assert told.isprintable()


@pytest.mark.parametrize("value", [HUGE, -HUGE, LARGEST + 1, [HUGE], "a" * 10**6, Rude()], ids=map(str, range(6)))
@pytest.mark.parametrize("check", [lambda value: whole("n", value), lambda value: number("n", value, 0.0, 1.0)])
def test_a_number_that_nobody_has_is_one_error(check: Any, value: object) -> None:
    with pytest.raises(InputError, match=r"^n must be ") as raised:
        check(value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "options",
    [{"min_new_tokens": HUGE}, {"banned_tokens": [HUGE]}, {"forced_tokens": {0: HUGE}}, {"logit_bias": {HUGE: 1.0}}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_sampling_may_be_any_number(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"must be at most {LARGEST}, not a value of type int"):
        Sampling(**options)
