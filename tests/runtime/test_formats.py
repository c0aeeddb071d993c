from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest

from runtime.errors import EngineFileError, InputError
from runtime.formats import MOST_LEVELS, Format, JsonFormat, check_levels


@dataclass(frozen=True)
class Box:
    width: Annotated[int, msgspec.Meta(ge=1, le=10)]
    about: dict[str, Any]

    def __post_init__(self) -> None:
        if self.about.get("width", self.width) != self.width:
            raise ValueError("two widths")


def nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


@pytest.fixture
def boxes() -> Iterator[JsonFormat[Box]]:
    yield JsonFormat("box", most_bytes=1000, remedy="pack it again", error=EngineFileError, kind=Box)
    del Format.known["box"]


def test_a_fitting_file_is_read(boxes: JsonFormat[Box], tmp_path: Path) -> None:
    path = tmp_path / "box.json"
    path.write_text('{"width": 3, "about": {"width": 3}, "of a later version": 1}')
    assert boxes.read(path) == Box(3, {"width": 3})


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b'{"width": 11, "about": {}}', "Expected `int` <= 10 - at `$.width`, which is 11"),
        (b'{"width": true, "about": {}}', "`$.width`, which is True"),
        (b'{"width": 1e3, "about": {}}', "`$.width`, which is 1000.0"),
        (b'{"width": "' + b"x" * 200 + b'", "about": {}}', "`$.width`, which is '" + "x" * 47 + "..." + "x" * 48 + "'"),
        (b'{"width": 1' + b"0" * 200 + b', "about": {}}', "`$.width`, which is 1" + "0" * 47 + "..." + "0" * 49),
        (b'{"width": [11], "about": {}}', "`$.width`)"),
        (b'{"about": {}}', "width"),
        (
            b'{"width": 1, "about": {"width": NaN}}',
            """malformed: invalid character (byte 32), in 'width": 1, "about": {"width": NaN}}'""",
        ),
        (b'{"width": 1, "about": {"width": 1e999}}', "out of range"),
        (b'{"width": 1, "about": {"width": 2}}', "two widths"),
        (b'{"width": 1, "about": {"\xff": 2}}', "code"),
        (b"[]", "object"),
        (b"", "truncated"),
        (b" " * 1001, "more than 1000 bytes"),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_cause(
    boxes: JsonFormat[Box], tmp_path: Path, content: bytes, cause: str
) -> None:
    path = tmp_path / "box.json"
    path.write_bytes(content)
    with pytest.raises(EngineFileError) as raised:
        boxes.read(path)
    assert str(raised.value).startswith(f"{path} is not a valid box (")
    assert cause in str(raised.value)
    assert str(raised.value).endswith("pack it again")
    assert "\n" not in str(raised.value)


@dataclass(frozen=True)
class Shelf:
    boxes: list[Box]
    by_name: dict[str, Box]


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (
            {"boxes": [{"width": 1, "about": {}}, {"width": float("nan"), "about": {}}]},
            "`$.boxes[1].width`, which is nan",
        ),
        (
            {"boxes": [], "by_name": {"a": {"width": -5, "about": {}}}},
            "Expected `int` >= 1 - at `$.by_name[...].width`)",
        ),
        ({"boxes": 3, "by_name": {}}, "`$.boxes`, which is 3"),
        ({"boxes": [{"width": 10**5000, "about": {}}]}, "`$.boxes[0].width`, which is a value of type int"),
        ({"boxes": [], "by_name": {"a": {"width": 1, "about": {"width": 2}}}}, "two widths"),
        ([], "Expected `object`, got `array`"),
    ],
)
def test_a_value_that_does_not_fit_is_an_error_with_the_part_that_does_not(
    boxes: JsonFormat[Box], value: object, cause: str
) -> None:
    assert boxes.fit({"boxes": [{"width": 1, "about": {}}], "by_name": {}}, Shelf, "here").boxes == [Box(1, {})]
    with pytest.raises(EngineFileError) as raised:
        boxes.fit(value, Shelf, "here")
    assert cause in str(raised.value)


def test_nesting_without_end_is_refused(boxes: JsonFormat[Box]) -> None:
    with pytest.raises(EngineFileError, match="nested too deeply"):
        boxes.decode('{"width": 1, "about": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}", "here")


def test_a_cause_is_cut_short(boxes: JsonFormat[Box]) -> None:
    with pytest.raises(EngineFileError) as raised:
        raise boxes.unfit("here", "x" * 10_000)
    assert len(str(raised.value)) < 400


def test_a_pipe_is_not_waited_for(boxes: JsonFormat[Box], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EngineFileError, match="no regular file"):
        boxes.read(tmp_path / "pipe")


def test_a_missing_file_is_an_error_of_the_format(boxes: JsonFormat[Box], tmp_path: Path) -> None:
    with pytest.raises(EngineFileError, match="No such file"):
        boxes.read(tmp_path / "none")


def test_a_text_must_be_utf_8(boxes: JsonFormat[Box], tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff")
    with pytest.raises(InputError, match="decode"):
        boxes.text(tmp_path / "text")


def test_a_format_is_described_once(boxes: JsonFormat[Box]) -> None:
    with pytest.raises(AssertionError, match="twice"):
        Format("box", 1, "")


@pytest.mark.parametrize("value", [None, 3, "text", {}, [], {"a": [{"b": [1, 2]}] * 1000}, nested(MOST_LEVELS - 1)])
def test_what_files_hold_is_not_nested_too_deeply(value: object) -> None:
    check_levels(value)


@pytest.mark.parametrize("value", [nested(MOST_LEVELS + 1), {"a": nested(900)}, [{"b": {"c": nested(MOST_LEVELS)}}]])
def test_values_within_values_have_a_limit(value: object) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        check_levels(value)


def test_no_more_memory_is_taken_than_a_file_needs(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"abc")
    wide = Format("wide", 1 << 60, "")
    del Format.known["wide"]
    assert wide.content(tmp_path / "small") == b"abc"
