"""Large files in pieces that can be carried, and whole again where they arrive, by size and SHA-256."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.errors import InputError
from runtime.files import atomic_path, sha256_file

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A file that holds a part of another, by name, size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """A file in pieces, in order."""

    name: str
    size: int
    sha256: str
    pieces: tuple[Piece, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**asdict(self), "pieces": [asdict(piece) for piece in self.pieces]}

    @classmethod
    def of_json(cls, value: Any, where: Path) -> Split:
        """Return what `to_json` gave. Raises `InputError`, naming the file `where` it is from, for anything else."""
        try:
            pieces = tuple(Piece(str(one["name"]), int(one["size"]), str(one["sha256"])) for one in value["pieces"])
            found = cls(str(value["name"]), int(value["size"]), str(value["sha256"]), pieces)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where} does not describe files in pieces; pack or fetch it again") from error
        for name in (found.name, *(piece.name for piece in found.pieces)):
            if not name or Path(name).name != name or name == "..":
                raise InputError(f"{where} names {name!r}, which is not the bare name of a file; pack it again")
        return found


def split(path: Path, folder: Path, sizes: Sequence[int]) -> Split:
    """Write `path` in pieces of up to `sizes` bytes, the last of which serves for all that come after; one piece keeps
    the name. Raises `InputError` where they cannot be written.
    """
    whole = path.stat().st_size
    bounds = [0]
    while bounds[-1] < whole or len(bounds) == 1:
        step = sizes[min(len(bounds), len(sizes)) - 1]
        if step < 1:
            raise InputError(f"pieces of {step} bytes hold nothing; allow more for each")
        bounds.append(min(whole, bounds[-1] + step))
    count = len(bounds) - 1
    pieces = []
    with path.open("rb") as source:
        for number in range(count):
            name = path.name if count == 1 else f"{path.name}.piece-{number + 1:02d}-of-{count:02d}"
            with atomic_path(folder / name) as temporary, temporary.open("wb") as target:
                digest = hashlib.sha256()
                left = bounds[number + 1] - bounds[number]
                while left:
                    block = source.read(min(left, MEBIBYTE))
                    if not block:
                        raise InputError(f"{path} became shorter while it was read; try again")
                    digest.update(block)
                    target.write(block)
                    left -= len(block)
            pieces.append(Piece(name, bounds[number + 1] - bounds[number], digest.hexdigest()))
    return Split(path.name, whole, sha256_file(path), tuple(pieces))


def missing(described: Split, folders: Iterable[Path]) -> list[str]:
    """Return the names of the pieces that are in none of the folders, in their size."""
    places = list(folders)
    return [piece.name for piece in described.pieces if _find(piece, places) is None]


def join(described: Split, folders: Iterable[Path], target: Path) -> None:
    """Write the whole file to `target`. Raises `InputError` for a piece that is missing or damaged."""
    places = list(folders)
    with atomic_path(target) as temporary:
        with temporary.open("wb") as file:
            for piece in described.pieces:
                found = _find(piece, places)
                if found is None:
                    raise InputError(f"{piece.name}, a piece of {described.name}, is missing; carry it there too")
                if sha256_file(found) != piece.sha256:
                    raise InputError(f"{found} is damaged; carry it there again")
                with found.open("rb") as source:
                    shutil.copyfileobj(source, file, MEBIBYTE)
        if sha256_file(temporary) != described.sha256:
            raise InputError(f"{described.name} is not what was packed, though its pieces are; pack it again")


def _find(piece: Piece, folders: Sequence[Path]) -> Path | None:
    for folder in folders:
        path = folder / piece.name
        if path.is_file() and path.stat().st_size == piece.size:
            return path
    return None
