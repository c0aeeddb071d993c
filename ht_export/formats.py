"""Formats that only build time reads: records by line, and files that state their version."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from runtime.formats import JsonFormat, check_levels

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


@dataclass(frozen=True, kw_only=True)
class PythonJsonFormat(JsonFormat[T]):
    """A format that Python's `json` writes: with NaN and infinite numbers, which JSON does not have."""

    def decode(self, content: bytes | str, where: object) -> T:
        """Return what `content`, found at `where`, holds. Raises `error`."""
        return self.fit(self.parse(content, where), self.kind, where)

    def parse(self, content: bytes | str, where: object) -> Any:
        """Return the values of `content`, found at `where`, whatever they are. Raises `error`."""
        try:
            value = json.loads(content if isinstance(content, str) else content.decode("utf-8"))
            check_levels(value)
        except RecursionError as error:
            raise self.unfit(where, "it is nested too deeply") from error
        except ValueError as error:
            raise self.unfit(where, error) from error
        return value


@dataclass(frozen=True, kw_only=True)
class VersionedFormat(PythonJsonFormat[T]):
    """A format that states its `version`: files of another one, but for `earlier` ones that are read too, are refused
    as such, and `again` says how to make one of this version.
    """

    version: int
    again: str
    earlier: tuple[int, ...] = ()

    def parse(self, content: bytes | str, where: object) -> Any:
        """Return the values of `content`, found at `where`, whatever they are. Raises `error`, also for a version."""
        value = super().parse(content, where)
        stated = value.get("version") if isinstance(value, dict) else None
        if isinstance(stated, int) and stated not in (self.version, *self.earlier):
            read = " and ".join(map(str, (*self.earlier, self.version)))
            raise self.error(
                f"{where} is of version {stated!s:.20}; this release reads version{'s' * bool(self.earlier)} {read}: "
                f"update hidden-transfer, or {self.again}"
            )
        return value
