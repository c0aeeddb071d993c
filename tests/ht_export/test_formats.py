from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ht_export.formats import LinesFormat, VersionedFormat
from runtime.errors import InputError
from runtime.formats import Format


@dataclass(frozen=True)
class Note:
    loss: float
    about: Any = None


@pytest.fixture
def notes() -> Iterator[VersionedFormat[Note]]:
    yield VersionedFormat("note", 1000, "write it again", kind=Note, version=2, again="write another")
    del Format.known["note"]


@pytest.fixture
def lines() -> Iterator[LinesFormat[Note]]:
    yield LinesFormat("line", 40, "write it again", kind=Note)
    del Format.known["line"]


def test_numbers_that_only_python_writes_are_read(notes: VersionedFormat[Note]) -> None:
    assert notes.decode('{"version": 2, "loss": Infinity}', "here") == Note(math.inf)
    assert math.isnan(notes.decode(b'{"version": 2, "loss": NaN}', "here").loss)


def test_another_version_is_told_whatever_else_there_is(notes: VersionedFormat[Note], tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    path.write_text('{"version": 3, "loss": "later"}')
    with pytest.raises(
        InputError, match=r"note.json is of version 3; this release reads version 2: update .* write an"
    ):
        notes.read(path)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ('{"version": 2, "loss": "x"}', "`$.loss`, which is 'x'"),
        ('{"version": "2", "loss": "x"}', "`$.loss`, which is 'x'"),
        ('{"version": 2}', "missing required field `loss`"),
        ('{"version": 1' + "0" * 900 + ', "loss": ', "Expecting value"),
        ("[2]", "Expected `object`"),
        ("", "Expecting value"),
        (b"\xff", "decode"),
        ('{"loss": 1, "about": ' + "[" * 70 + "]" * 70 + "}", "nested too deeply"),
        ('{"loss": 1, "about": ' + '{"a":' * 20_000 + "1" + "}" * 20_000 + "}", "nested too deeply"),
        ('{"loss": 1' + "0" * 5000 + "}", "4300 digits"),
    ],
)
def test_what_does_not_fit_is_one_line(notes: VersionedFormat[Note], content: bytes | str, cause: str) -> None:
    with pytest.raises(InputError) as raised:
        notes.decode(content, "here")
    assert str(raised.value).startswith("here is not a valid note (")
    assert cause in str(raised.value)
    assert "\n" not in str(raised.value)


def test_lines_are_counted_and_blank_ones_left_out(lines: LinesFormat[Note], tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"loss": 1}\r\n \n\n{"loss": 2}')
    assert list(lines.lines(path)) == [(1, Note(1.0)), (4, Note(2.0))]
    path.write_bytes(b'{"loss": 1}\n{"loss": ' + b" " * 40 + b"2}\n")
    with pytest.raises(InputError, match=r"lines, line 2 is not a valid line \(it has more than 40 bytes\)"):
        list(lines.lines(path))
    with pytest.raises(InputError, match="No such file"):
        list(lines.lines(tmp_path / "none"))
