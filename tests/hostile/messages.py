"""Texts and conversations by somebody hostile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

PIECES = (
    *(
        "a",
        "Hello ",
        " ",
        "\n",
        "\r\n",
        "\t",
        "0",
        "1,000.00",
        "''",
        "don't",
        "é",
        "e\u0301",
        "漢字",
        "🫖",
        "👩‍👩‍👧",
        "\u202e",
        "\ufeff",
    ),
    *(
        "\x00",
        "\x07",
        "\x1b[2J",
        "\x7f",
        "\u2028",
        "\ufffd",
        "\uffff",
        "\U0010ffff",
        "\ud800",
        "\udfff",
        "\udc80a",
        "İ",
        "\u017f",
        "ﬃ",
        "ﷺ",
    ),
    *(
        "<s>",
        "</s>",
        "<pad>",
        "<|user|>",
        "<|assistant|>",
        "<|im_end|>",
        "< s >",
        "<S>",
        "{{ 7 }}",
        "{% raw %}",
        "%s",
        "\\x",
        "\U000f0000",
    ),
)


@dataclass(frozen=True)
class Repeated:
    """A text or a list in which a part comes again and again: hypothesis keeps what it draws, and so not what it is."""

    before: Any
    part: Any
    times: int
    after: Any


@dataclass(frozen=True)
class Circle:
    """A message that holds itself."""


def written(value: Any) -> Any:
    """Return what is asked for: `value` with all that stands for something long in it written out."""
    if isinstance(value, Repeated):
        return value.before + value.part * value.times + value.after
    if isinstance(value, Circle):
        message: dict[str, Any] = {"role": "user", "content": "a"}
        message["self"] = message
        return message
    if isinstance(value, dict):
        return {key: written(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(written, value))
    return value


@st.composite
def texts(draw: st.DrawFn) -> Repeated:
    """A text by somebody hostile, to be `written`."""
    parts = draw(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=6))
    # Few of which are long: those that are read whole take long.
    times = draw(st.sampled_from((1,) * 20 + (3, 50, 1000, 70_000, 1_000_000)))
    place = draw(st.integers(0, max(0, len(parts) - 1)))
    return Repeated("".join(parts[:place]), "".join(parts[place : place + 1]), times, "".join(parts[place + 1 :]))


WAYS = st.fixed_dictionaries(
    {"raw": st.booleans()}, optional={"escape_special_tokens": st.booleans(), "prediction": texts()}
)
STOPS = st.lists(st.sampled_from(("a", "\ufffd", "</s>", "\ud800", " ", "é", "x" * 10_000)), max_size=2)


# Python does not write such numbers, and so no strategy of them.
HUGE = st.sampled_from((400, 5000)).flatmap(lambda digits: st.sampled_from((1, -1)).map(lambda sign: sign * 10**digits))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), HUGE, st.floats(), texts(), st.binary(max_size=3), st.just({1})
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
)


@st.composite
def _deep(draw: st.DrawFn) -> Any:
    value: Any = draw(SCALARS)
    for _ in range(draw(st.sampled_from((5, 100, 127, 128, 129, 500)))):
        value = {"a": value} if draw(st.integers(0, 3)) else [value]
    return value


@st.composite
def conversations(draw: st.DrawFn) -> Any:
    """Messages by somebody hostile, or what is none, to be `written`."""
    roles = st.sampled_from(("user", "assistant", "system", "tool"))
    message = st.fixed_dictionaries({"role": roles, "content": texts()})
    odd = st.fixed_dictionaries(
        {"role": st.one_of(roles, texts(), SCALARS), "content": st.one_of(texts(), VALUES)},
        optional={"tool_calls": VALUES, "thinking": VALUES, "reasoning": _deep(), "\ud800": VALUES},
    )
    found: Any = draw(st.lists(st.one_of(message, message, message, odd, VALUES), max_size=4))
    what = draw(st.sampled_from(("list",) * 8 + ("tuple", "circle", "value", "many")))
    if what == "circle":
        return [Circle()]
    if what == "many":
        return Repeated([], [{"role": "user", "content": ""}], draw(st.sampled_from((1000, 2_000_000))), [])
    return {"list": found, "tuple": tuple(found), "value": draw(VALUES)}[what]
