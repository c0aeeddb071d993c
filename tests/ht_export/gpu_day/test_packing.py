"""What is carried to a machine without a network: in loads, in pieces, and whole again where it arrives."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from ht_export.gpu_day import packing, wheels
from ht_export.gpu_day.packing import KIT, PackSettings, pack, site, take_in
from ht_export.gpu_day.pieces import MEBIBYTE, Split, join, missing, split
from ht_export.gpu_day.settings import DaySettings
from runtime.errors import InputError

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def nothing(_: str) -> None:
    pass


@pytest.fixture
def machine(tmp_path: Path) -> DaySettings:
    return DaySettings(tmp_path / "machine", tmp_path / "results", "cuda")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of answers, with enough that cannot be compressed for several loads."""
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"shards": ["shard-0.jsonl"]}))
    (folder / "shard-0.jsonl").write_bytes(os.urandom(5 * MEBIBYTE))
    return folder


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000])
def test_a_file_in_pieces_is_the_same_file(tmp_path: Path, size: int) -> None:
    source = tmp_path / "wheel.whl"
    source.write_bytes(os.urandom(size))
    described = split(source, tmp_path / "pieces", [30, 100])
    assert sum(piece.size for piece in described.pieces) == size
    assert all(piece.size <= 100 for piece in described.pieces)
    assert Split.of_json(json.loads(json.dumps(described.to_json())), source) == described
    join(described, [tmp_path / "pieces"], tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == source.read_bytes()


def test_pieces_that_are_damaged_or_missing_are_told(tmp_path: Path) -> None:
    source = tmp_path / "wheel.whl"
    source.write_bytes(bytes(250))
    described = split(source, tmp_path / "pieces", [100])
    first, second, third = (tmp_path / "pieces" / piece.name for piece in described.pieces)
    second.write_bytes(b"\1" * 100)
    with pytest.raises(InputError, match=f"{second.name} is damaged; carry it there again"):
        join(described, [tmp_path / "pieces"], tmp_path / "joined")
    second.write_bytes(bytes(100))
    third.unlink()
    assert missing(described, [tmp_path / "pieces"]) == [third.name]
    with pytest.raises(InputError, match=r"a piece of wheel\.whl, is missing"):
        join(described, [tmp_path / "pieces"], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    assert first.exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".."])
def test_a_description_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    odd = {"name": "a", "size": 1, "sha256": "0", "pieces": [{"name": name, "size": 1, "sha256": "0"}]}
    with pytest.raises(InputError, match="is not the bare name of a file"):
        Split.of_json(odd, tmp_path)
    with pytest.raises(InputError, match="does not describe files in pieces"):
        Split.of_json({"name": "a"}, tmp_path)


def test_what_is_packed_arrives_load_by_load(tmp_path: Path, data: Path, machine: DaySettings) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n')
    settings = PackSettings(
        tmp_path / "kit", HERE, load_bytes=2 * MEBIBYTE, packages=("msgspec",), kernels=0, prompts=prompts, data=data
    )
    about = pack(settings, nothing)
    loads = sorted((tmp_path / "kit").glob("load-*"))
    assert len(loads) == len(about["loads"]) >= 3
    assert all(sum(path.stat().st_size for path in load.iterdir()) <= 2 * MEBIBYTE for load in loads)
    for number, load in enumerate(loads, start=1):
        said: list[str] = []
        assert take_in(load, machine, said.append) == about
        complete = number == len(loads)
        assert any("not here yet" in line for line in said) != complete
    assert (machine.kit / "data/shard-0.jsonl").read_bytes() == (data / "shard-0.jsonl").read_bytes()
    assert (machine.kit / "train-prompts.jsonl").read_text() == prompts.read_text()
    assert (site(machine) / "msgspec/__init__.py").is_file()
    # Once it is there nothing need be carried again, and nothing is unpacked twice.
    said = []
    assert take_in(machine.kit, machine, said.append) == about
    assert said == []


def test_packing_again_uses_what_was_made(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = PackSettings(tmp_path / "kit", HERE, packages=("msgspec",), kernels=0, data=data)
    first = pack(settings, nothing)
    monkeypatch.setattr(wheels, "_pack", lambda *_: pytest.fail("packed again"))
    assert pack(settings, nothing)["files"][-1] == first["files"][-1]


def test_a_package_that_cannot_be_had_is_left_out(tmp_path: Path, data: Path) -> None:
    settings = PackSettings(tmp_path / "kit", HERE, packages=("no-such-package",), kernels=0, data=data)
    said: list[str] = []
    about = pack(settings, said.append)
    assert "no-such-package is not installed here" in about["left_out"]["no-such-package"]
    assert said == [f"left out: {about['left_out']['no-such-package']}"]
    assert [one["name"] for one in about["files"]] == ["texts.zip"]


def test_a_wheel_for_another_python_is_asked_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(wanted: str, folder: Path, python: str) -> Path:
        asked.append(f"{wanted} for {python}")
        return folder / "msgspec.whl"

    monkeypatch.setattr(wheels, "_fetch", fetch)
    # Compiled for a Python, and for none.
    wheels.archive_of("msgspec", tmp_path, "3.99", nothing)
    assert len(asked) == 1
    assert asked[0].startswith("msgspec==")
    assert asked[0].endswith("for 3.99")
    assert wheels.archive_of("gguf", tmp_path, "3.99", nothing).name.endswith("-py3-none-any.whl")
    assert len(asked) == 1


def test_wheels_are_unpacked_as_pip_would(tmp_path: Path) -> None:
    wheel = tmp_path / "one-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("one/__init__.py", "here = 1\n")
        archive.writestr("one-1.data/purelib/one/more.py", "")
        archive.writestr("one-1.data/scripts/run", "")
    assert wheels.unpack([wheel], tmp_path / "site") == [wheel.name]
    assert wheels.unpack([wheel], tmp_path / "site") == []
    found = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.py")}
    assert found == {"one/__init__.py", "one/more.py"}
    assert not list((tmp_path / "site").rglob("run"))
    wheel.with_name("two-1-py3-none-any.whl").write_bytes(b"no wheel")
    with pytest.raises(InputError, match="is no wheel"):
        wheels.unpack([wheel.with_name("two-1-py3-none-any.whl")], tmp_path / "site")


def test_no_kit_and_a_damaged_one(tmp_path: Path, machine: DaySettings) -> None:
    (tmp_path / "kit").mkdir()
    assert take_in(tmp_path / "kit", machine, nothing) is None
    (tmp_path / "kit" / KIT).write_text("{")
    with pytest.raises(InputError, match="pack the kit again"):
        take_in(tmp_path / "kit", machine, nothing)
    with pytest.raises(InputError, match="no folder that ht-train data has made"):
        pack(PackSettings(tmp_path / "out", HERE, packages=(), kernels=0, data=tmp_path), nothing)
    with pytest.raises(InputError, match="too small"):
        pack(PackSettings(tmp_path / "out", HERE, load_bytes=1, packages=(), kernels=0), nothing)


def test_pieces_fill_loads_to_their_ends() -> None:
    large = packing.LARGEST_PIECE
    assert packing._sizes(10, 20, 100) == [10]
    assert packing._sizes(3 * large, 2 * MEBIBYTE, large) == [2 * MEBIBYTE, large]
    assert packing._sizes(3 * large, 1000, large) == [large, large]
