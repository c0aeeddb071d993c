import json
from pathlib import Path

from runtime.files import write_json


def test_what_is_no_number_in_json_is_written_as_null(tmp_path: Path) -> None:
    value = {"a": float("nan"), "b": [float("inf"), (1, -float("inf"))], "c": {"d": 0.5, "e": None, "f": True}}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "a": None,
        "b": [None, [1, None]],
        "c": {"d": 0.5, "e": None, "f": True},
    }


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"é": ["漢字"]})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "é": [\n    "漢字"\n  ]\n}\n'
