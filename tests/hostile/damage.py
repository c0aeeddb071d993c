"""Damage to bytes and to JSON: by accident, and on purpose by somebody who knows the format."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from hypothesis import strategies as st

# Numbers that are one too many or one too few for some type, or whose product with another is.
WHOLE_NUMBERS = (0, 1, 2, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1)
FRAGMENTS = (
    b"",
    b"\x00",
    b"\xff",
    b"\xff" * 8,
    b"{",
    b"}",
    b'"',
    b"[" * 50,
    b"\\ud800",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
)


P = ParamSpec("P")
T = TypeVar("T")


def drawn(function: Callable[Concatenate[st.DrawFn, P], T]) -> Callable[P, st.SearchStrategy[T]]:
    """As `hypothesis.strategies.composite`, which prints the arguments, for such as are too long for that."""

    @wraps(function)
    def strategy(*arguments: P.args, **options: P.kwargs) -> st.SearchStrategy[T]:
        def draws(draw: st.DrawFn) -> T:
            return function(draw, *arguments, **options)

        return st.composite(draws)()

    return strategy


@st.composite
def places(draw: st.DrawFn, length: int) -> int:
    """A place in so many bytes, often near one of their ends."""
    return draw(
        st.one_of(
            st.integers(0, min(length, 64)),
            st.integers(0, length),
            st.integers(max(0, length - 64), length),
        )
    )


@drawn
def damaged(draw: st.DrawFn, sample: bytes, at: Sequence[int] = ()) -> bytes:
    """`sample`, damaged one to four times; `at` are places where the format has its numbers."""
    found = bytearray(sample)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 4)))):
        start = draw(st.one_of(st.sampled_from(at), places(len(found)))) if at else draw(places(len(found)))
        start = min(start, len(found))
        end = min(len(found), start + draw(st.sampled_from((1, 4, 8, 64, 4096, 1 << 30))))
        what = draw(st.sampled_from(("cut", "flip", "poke", "zero", "insert", "delete", "repeat", "move", "fill")))
        if what == "cut":
            del found[start:]
        elif what == "flip" and start < len(found):
            found[start] ^= 1 << draw(st.integers(0, 7))
        elif what == "poke":
            width = draw(st.sampled_from((1, 2, 4, 8)))
            number = draw(st.sampled_from(WHOLE_NUMBERS)) % (1 << 8 * width)
            found[start : start + width] = number.to_bytes(width, draw(st.sampled_from(("little", "big"))))
        elif what == "zero":
            found[start:end] = bytes(end - start)
        elif what == "insert":
            found[start:start] = draw(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=16)))
        elif what == "delete":
            del found[start:end]
        elif what == "repeat":
            found[start:start] = found[start:end][: 1 << 16]
        elif what == "move":
            place = draw(places(len(found)))
            found[place:place] = found[start:end][: 1 << 16]
        elif what == "fill":
            found[start:end] = draw(st.sampled_from((b"\xff", b" ", b"9"))) * (end - start)
    return bytes(found)


class Raw(str):
    """Text that stands in JSON as it is, whatever it is."""


class Pairs(list):
    """An object of JSON as a list of its pairs: with keys that come twice."""


HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    *WHOLE_NUMBERS,
    *(-number for number in WHOLE_NUMBERS[1:]),
    10**30,
    Raw("1" * 5000),
    -0.0,
    0.5,
    1e-320,
    1e308,
    Raw("1e999"),
    Raw("-1e999"),
    Raw("NaN"),
    Raw("Infinity"),
    Raw("-Infinity"),
    Raw(""),
    Raw("01"),
    Raw("1,"),
    "",
    "x",
    "\ud800",
    "\x00",
    "\u2028",
    "..",
    "../x",
    "/etc/passwd",
    "x" * 300,
    "é" * 100_000,
    "%s%n{0}{{",
    Raw('"\\x"'),
    Raw(b'"\xed\xa0\x80"'.decode("latin-1")),
    [],
    {},
    [None],
    [[]],
    ["x"],
    {"": None},
    Raw("[" * 70 + "]" * 70),
    Raw("[" * 2000 + "]" * 2000),
    Raw("[" * 100_000 + "]" * 100_000),
    Raw('{"a":' * 5000 + "1" + "}" * 5000),
    Raw("[" * 1000),
    Raw("[" + "0," * 100_000 + "0]"),
    Raw("{" + ",".join(f'"{number}":0' for number in range(20_000)) + "}"),
)


def encode_json(value: Any) -> bytes:
    """Return `value` as JSON, or as what `Raw` parts make of it."""
    if isinstance(value, Raw):
        return value.encode("latin-1")
    if isinstance(value, dict):
        value = Pairs(value.items())
    if isinstance(value, Pairs):
        return b"{" + b",".join(encode_json(key) + b":" + encode_json(item) for key, item in value) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(encode_json, value)) + b"]"
    return json.dumps(value).encode()


@drawn
def damaged_value(draw: st.DrawFn, value: Any, more: Sequence[Any] = ()) -> Any:
    """`value`, of JSON, with one to three of its parts replaced, removed, repeated or renamed; also by parts of itself
    and by `more`.
    """
    found = copy.deepcopy(value)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        found = _changed(draw, found, value, more)
    return found


@drawn
def damaged_json(draw: st.DrawFn, value: Any, more: Sequence[Any] = ()) -> bytes:
    """JSON of `value`: damaged as a value mostly, else as bytes."""
    if draw(st.integers(0, 9)):
        return encode_json(draw(damaged_value(value, more)))
    return draw(damaged(json.dumps(value, indent=1).encode()))


@drawn
def damaged_lines(draw: st.DrawFn, values: Sequence[Any]) -> bytes:
    """JSON of `values`, one a line: one of them damaged as a value, or all as bytes."""
    lines = [json.dumps(value).encode() for value in values]
    if not draw(st.integers(0, 4)):
        return draw(damaged(b"\n".join(lines)))
    number = draw(st.integers(0, len(lines) - 1))
    lines[number] = encode_json(draw(damaged_value(values[number])))
    return draw(st.sampled_from((b"\n", b"\r\n", b"\n\n"))).join(lines)


def _changed(draw: st.DrawFn, value: Any, whole: Any, more: Sequence[Any]) -> Any:
    # Down one of the parts, mostly: of a large part as often as of a small one.
    if value and isinstance(value, dict | list) and not isinstance(value, Pairs) and draw(st.integers(0, 7)):
        key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        what = draw(st.sampled_from(("change",) * 8 + ("remove", "repeat", "rename", "add")))
        if what == "remove":
            del value[key]
        elif isinstance(value, list) and what == "repeat":
            value.insert(key, value[key])
        elif isinstance(value, dict) and what == "repeat":
            return Pairs([*value.items(), (key, draw(st.sampled_from((value[key], *HOSTILE))))])
        elif isinstance(value, dict) and what == "rename":
            value[draw(st.sampled_from(("", "x", "\ud800", key.upper(), f"{key} ")))] = value.pop(key)
        elif isinstance(value, dict) and what == "add":
            value["unknown"] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        else:
            value[key] = _changed(draw, value[key], whole, more)
        return value
    others = draw(
        st.sampled_from((HOSTILE, _relatives(value), _relatives(value), (*more, *_parts_of(whole)) or HOSTILE))
    )
    # A copy: it may be changed further.
    return copy.deepcopy(draw(st.sampled_from(others)))


def _relatives(value: Any) -> list[Any]:
    """Return values that are nearly `value`, or it as another type."""
    found = [[value], [value, value], {"x": value}]
    if isinstance(value, bool | None):
        return found
    if isinstance(value, int):
        return [*found, value + 1, value - 1, -value, 2 * value, value + 0.5, str(value)]
    if isinstance(value, float):
        return [*found, -value, 1 / value if value else 1.0, 1 + value, str(value)]
    if isinstance(value, str):
        return [*found, value + " ", value[:-1], value.upper(), value + "\n", value + "\x00", 2 * value]
    return [*found, str(value)] if isinstance(value, dict) else [*found, value[:-1], value * 2, value[::-1]]


def _parts_of(whole: Any) -> list[Any]:
    return list(whole.values()) if isinstance(whole, dict) else list(whole) if isinstance(whole, list) else []
