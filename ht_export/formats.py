"""Formats that only build time reads: records by line, and files that state their version."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from runtime.formats import JsonFormat

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LinesFormat(JsonFormat[T]):
    """A format with one JSON value of `kind` a line, each of up to `most_bytes`; the file may be of any length."""

    def lines(self, path: Path) -> Iterator[tuple[int, T]]:
        """Yield (number, value) of each line of the file at `path` that is not blank, counted from 1.

        They are read as they are asked for. Raises `error` with the number of a line that does not fit.
        """
        with self.opened(path) as file:
            number = 0
            # Split at line feeds only: JSON strings may hold other Unicode line separators unescaped.
            while line := file.readline(self.most_bytes + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > self.most_bytes:
                    raise self.unfit(where, f"it has more than {self.most_bytes} bytes")
                if line.strip():
                    yield number, self.decode(line, where)


@dataclass(frozen=True)
class _Version:
    version: Any = None


@dataclass(frozen=True, kw_only=True)
class VersionedFormat(JsonFormat[T]):
    """A format that states its `version`: files of another one are refused as such, and `again` says how to make one
    of this version.
    """

    version: int
    again: str

    def decode(self, content: bytes | str, where: object) -> T:
        """Return what `content`, found at `where`, holds. Raises `error`."""
        try:
            stated = msgspec.json.decode(content, type=_Version).version
        except (msgspec.MsgspecError, ValueError, RecursionError):
            # Told below, as all that does not fit.
            stated = None
        if isinstance(stated, int) and stated != self.version:
            raise self.error(
                f"{where} is of version {stated!s:.20}; this release reads version {self.version}: "
                f"update hidden-transfer, or {self.again}"
            )
        return super().decode(content, where)
