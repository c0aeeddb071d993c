import json
import os
import sys
from pathlib import Path

import pytest

from runtime.errors import InputError
from runtime.files import atomic_path, check_name, check_readable, check_writable, temporary_prefix, write_json

posix = pytest.mark.skipif(sys.platform == "win32", reason="names as POSIX has them")
SUFFIX = ".chat_template.jinja"


@posix
@pytest.mark.parametrize("character", ["a", "\u00fc", "\U0001f600", "\udcff"])
def test_the_longest_name_that_there_can_be_is_written(character: str, tmp_path: Path) -> None:
    """A temporary file's name, which has more characters, is cut."""
    size = len(os.fsencode(character))
    path = tmp_path / (character * (250 // size) + "b" * (250 % size) + ".json")
    assert len(os.fsencode(path.name)) == 255
    check_writable(path)
    with atomic_path(path) as temporary:
        temporary.write_text("{}")
        assert temporary.name.startswith(f".{character}")
    assert list(tmp_path.iterdir()) == [path]


@posix
def test_a_name_of_a_byte_more_is_refused_before_work(tmp_path: Path) -> None:
    path = tmp_path / "folder" / ("a" * 251 + ".json")
    for use in (check_name, check_writable, lambda path: write_json(path, {})):
        with pytest.raises(
            InputError, match="the file's name has 256 bytes, and 255 are allowed; choose a shorter one"
        ):
            use(path)
    assert list(tmp_path.iterdir()) == []


@posix
def test_the_names_of_an_engines_other_files_count(tmp_path: Path) -> None:
    check_name(tmp_path / ("a" * 235 + ".onnx"), SUFFIX)
    with pytest.raises(
        InputError,
        match="file's name has 241 bytes, and 240 are allowed, for names beside it have up to 15 more; choose a",
    ):
        check_name(tmp_path / ("a" * 236 + ".onnx"), SUFFIX)
    # The name itself is the longer one.
    check_name(tmp_path / ("a" * 235 + ".safetensors"), ".json")


@posix
def test_a_folders_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder's name has 300 bytes, and 255 are allowed"):
        check_writable(tmp_path / ("a" * 300) / "report.json")


@posix
def test_a_path_that_is_too_long_is_refused_and_the_longest_one_is_written(tmp_path: Path) -> None:
    folder = tmp_path
    while len(str(folder)) < 3800:
        folder /= "a" * 200
    # Beside it is written ".x.json.RANDOMXX", which may be a folder with "x.json".
    room = 4095 - 16 - len("x.json")
    folder /= "b" * (room - len(str(folder)) - len("/") - len("/x.json"))
    check_writable(folder / "x.json")
    write_json(folder / "x.json", {})
    assert (folder / "x.json").read_text() == "{}\n"
    with pytest.raises(
        InputError, match="the path has 4074 bytes, and 4072 are allowed; choose a shorter one"
    ) as error:
        check_writable(folder / "xx.json")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("path", [".", "/", "..", ""])
def test_a_folder_is_no_file(path: str) -> None:
    for use in (check_writable, lambda path: write_json(path, {})):
        with pytest.raises(InputError, match=r"is a folder; give the name of a file"):
            use(Path(path))


def test_a_character_that_no_name_has_is_refused(tmp_path: Path) -> None:
    for use in (check_name, check_readable, check_writable, lambda path: write_json(path, {})):
        with pytest.raises(InputError, match=r"engine\\x00.onnx' has a character of code 0"):
            use(tmp_path / "engine\0.onnx")


def test_a_name_that_is_not_utf_8_is_refused_where_libraries_read_the_file() -> None:
    with pytest.raises(InputError, match=r"'/models/a\\udcff/engine.onnx': the name is not in UTF-8; rename the file"):
        check_readable(Path("/models/a\udcff/engine.onnx"))
    check_readable(Path("/models/\u00fc.onnx"))


@posix
def test_no_file_takes_the_place_of_a_device_a_pipe_or_a_folder(tmp_path: Path) -> None:
    """As root, `--json /dev/null` would leave the machine without one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for use in (check_writable, lambda path: write_json(path, {})):
        for name in ("pipe", "link"):
            with pytest.raises(InputError, match=f"{name} is a device or a pipe; give the name of a file"):
                use(tmp_path / name)
        with pytest.raises(InputError, match="is a folder; give the name of a file"):
            use(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


def test_a_temporary_files_name_tells_what_it_is_for(tmp_path: Path) -> None:
    assert temporary_prefix(tmp_path / "engine.onnx") == ".engine.onnx."


def test_json_has_an_escape_for_what_is_not_utf_8(tmp_path: Path) -> None:
    """As the path of an engine in the command that a report quotes."""
    value = {"command": "ht-bench run /models/\u00fc\udcff.onnx"}
    write_json(tmp_path / "report.json", value)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == value


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
