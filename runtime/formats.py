"""Formats of the files that we read and that somebody else may have written.

Each is described once, with its types and ranges, and is read whole or not at all: whatever the bytes are, reading ends
soon, in a value that fits the description or in one error that names the file.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import msgspec

from runtime.errors import InputError

T = TypeVar("T")
# Characters of a cause that an error repeats: it may quote the file.
LONGEST_CAUSE = 300
# Levels of values within values in a part whose form is free: far more than any file has, and far fewer than what walks
# through it bears.
MOST_LEVELS = 64


@dataclass(frozen=True)
class Format:
    """A format by name, such as "engine.json".

    A file of it has up to `most_bytes`; `remedy` says what to do about one that does not fit, and such a file raises
    `error`. Every format that exists is in `known`, by name.
    """

    name: str
    most_bytes: int
    remedy: str
    error: type[InputError] = InputError

    known: ClassVar[dict[str, Format]] = {}

    def __post_init__(self) -> None:
        assert self.name not in Format.known, f"{self.name} is described twice"
        Format.known[self.name] = self

    def content(self, path: Path) -> bytes:
        """Return the bytes of the file at `path`. Raises `error` for one that cannot be read, or is too large."""
        try:
            # Before it is opened: opening a pipe waits for whoever writes into it.
            if not stat.S_ISREG(path.stat().st_mode):
                raise self.unfit(path, "it is no regular file")
            with path.open("rb") as file:
                return self.content_of(file, path)
        except OSError as error:
            raise self.unfit(path, error.strerror or str(error)) from error

    def content_of(self, file: BufferedReader, path: Path) -> bytes:
        """Return the bytes of an open file, that at `path`. Raises `error` for one that is too large, and `OSError`."""
        # One byte more than is allowed, and room for no more than there is: `read` takes memory beforehand.
        content = file.read(min(self.most_bytes, os.fstat(file.fileno()).st_size) + 1)
        if len(content) > self.most_bytes:
            raise self.unfit(path, f"it has more than {self.most_bytes} bytes")
        return content

    def text(self, path: Path) -> str:
        """Return the text of the file at `path`. Raises `error` as `content` does, and where it is not UTF-8."""
        return self.text_of(self.content(path), path)

    def text_of(self, content: bytes, where: object) -> str:
        """Return `content`, found at `where`, as text. Raises `error` where it is not UTF-8."""
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.unfit(where, error) from error

    def unfit(self, where: object, cause: object) -> InputError:
        """Return the error that tells that what is at `where` does not fit, and why."""
        lines = str(cause).split("\n", maxsplit=1)
        return self.error(f"{where} is not a valid {self.name} ({lines[0][:LONGEST_CAUSE]}); {self.remedy}")


@dataclass(frozen=True, kw_only=True)
class JsonFormat(Format, Generic[T]):
    """A format in JSON that `kind` describes: a type that msgspec decodes, with ranges from `msgspec.Meta`.

    What several fields must have in common is checked where `kind` is made, in a `__post_init__` that raises
    `ValueError`.
    """

    kind: type[T]

    def read(self, path: Path) -> T:
        """Return what the file at `path` holds. Raises `error`."""
        return self.decode(self.content(path), path)

    def decode(self, content: bytes | str, where: object) -> T:
        """Return what `content`, found at `where`, holds. Raises `error`."""
        try:
            return msgspec.json.decode(content, type=self.kind)
        except RecursionError as error:
            raise self.unfit(where, "it is nested too deeply") from error
        except (msgspec.MsgspecError, ValueError) as error:
            raise self.unfit(where, error) from error


def check_levels(value: object) -> None:
    """Raise `ValueError` when `value`, of JSON, is nested more deeply than `MOST_LEVELS`: for parts of free form."""
    level = [value]
    for _ in range(MOST_LEVELS):
        parts = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [value for part in parts for value in part]
        if not level:
            return
    raise ValueError("it is nested too deeply")
