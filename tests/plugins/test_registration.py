"""The library quirk that registering the plugin takes care of."""

import _ctypes
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from plugins import tensorrt_plugin

LIBRARY = "libnot_there_for_sure.so"


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of libraries as the wheel has it: with a version in the name, and no other name."""
    shutil.copy(_ctypes.__file__, tmp_path / f"{LIBRARY}.1")
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    monkeypatch.setattr(tensorrt_plugin, "LIBRARY", LIBRARY)
    return tmp_path


def test_tensorrt_for_rtx_finds_itself_under_the_name_that_it_looks_for(libraries: Path) -> None:
    for _ in range(2):
        tensorrt_plugin._make_findable(SimpleNamespace(__name__="tensorrt_rtx"))
        assert (libraries / LIBRARY).readlink() == Path(f"{LIBRARY}.1")


def test_a_folder_that_cannot_be_written_says_what_to_do(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(
        RuntimeError, match=rf"cannot be made here \(Permission denied\); make it once with: ln -s {LIBRARY}"
    ):
        tensorrt_plugin._make_findable(SimpleNamespace(__name__="tensorrt_rtx"))


def test_tensorrt_needs_nothing(libraries: Path) -> None:
    tensorrt_plugin._make_findable(SimpleNamespace(__name__="tensorrt"))
    assert [path.name for path in libraries.iterdir()] == [f"{LIBRARY}.1"]
