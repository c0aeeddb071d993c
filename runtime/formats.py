"""Formats of the files that we read and that somebody else may have written.

Each is described once, with its types and ranges, and is read whole or not at all: whatever the bytes are, reading ends
soon, in a value that fits the description or in one error that names the file.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import msgspec

from runtime.errors import InputError, one_line, shown

T = TypeVar("T")
K = TypeVar("K")
# Levels of values within values in a part whose form is free: far more than any file has, and far fewer than what walks
# through it bears.
MOST_LEVELS = 64
# Bytes of a malformed text that its error shows before the first one that cannot be, and from it on.
SHOWN_BEFORE = 30
SHOWN_FROM = 10


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
        with self.opened(path) as file:
            return self.content_of(file, path)

    def content_of(self, file: BufferedReader, path: Path) -> bytes:
        """Return the bytes of an open file, that at `path`. Raises `error` for one that is too large, and `OSError`."""
        # One byte more than is allowed, and room for no more than there is: `read` takes memory beforehand.
        content = file.read(min(self.most_bytes, os.fstat(file.fileno()).st_size) + 1)
        if len(content) > self.most_bytes:
            raise self.unfit(path, f"it has more than {self.most_bytes} bytes")
        return content

    @contextlib.contextmanager
    def opened(self, path: Path) -> Iterator[BufferedReader]:
        """Yield the file at `path`, open for reading. Raises `error` where that, or a read within the block, fails."""
        try:
            # Before it is opened: opening a pipe waits for whoever writes into it.
            if not stat.S_ISREG(path.stat().st_mode):
                raise self.unfit(path, "it is no regular file")
            with path.open("rb") as file:
                yield file
        except OSError as error:
            raise self.unfit(path, error.strerror or str(error)) from error

    def text(self, path: Path) -> str:
        """Return the text of the file at `path`. Raises `error` as `content` does, and where it is not UTF-8."""
        return self.text_of(self.content(path), path)

    def text_of(self, content: bytes, where: object) -> str:
        """Return `content`, found at `where`, as text. Raises `error` where it is not UTF-8."""
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.unfit(where, error) from error

    def fit(self, value: object, kind: type[K], where: object) -> K:
        """Return `value`, found at `where`, as a `kind`, which msgspec converts to. Raises `error`."""
        try:
            return msgspec.convert(value, kind)
        except (msgspec.MsgspecError, ValueError) as error:
            raise self.unfit(where, _with_value(error, lambda: value)) from error

    def unfit(self, where: object, cause: object) -> InputError:
        """Return the error that tells that what is at `where` does not fit, and why."""
        return self.error(f"{where} is not a valid {self.name} ({one_line(cause)}); {self.remedy}")


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
        except msgspec.ValidationError as error:
            raise self.unfit(where, _with_value(error, lambda: msgspec.json.decode(content))) from error
        except (msgspec.MsgspecError, ValueError) as error:
            raise self.unfit(where, _with_text(error, content)) from error


def check_levels(value: object) -> None:
    """Raise `ValueError` when `value`, of JSON, is nested more deeply than `MOST_LEVELS`: for parts of free form."""
    level = [value]
    for _ in range(MOST_LEVELS):
        parts = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [value for part in parts for value in part]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _with_value(error: Exception, found: Callable[[], object]) -> str:
    """Return the message of msgspec's `error` with the value that it is about, where that is a single one."""
    message = str(error)
    at = re.search(r" - at `\$(.+)`$", message)
    try:
        value = _at(found(), at[1] if at else "")
    except (msgspec.MsgspecError, ValueError, LookupError, TypeError, RecursionError):
        return message
    if isinstance(value, dict | list | tuple):
        return message
    return f"{message}, which is {shown(value)}"


def _at(value: object, path: str) -> object:
    """Return the part of `value` at `path`, such as `.files[3].name`. Raises `LookupError` for a path that names no one
    part: keys of free choice are `[...]`.
    """
    while path:
        index = re.match(r"\[(\d+)\]", path)
        if index and isinstance(value, list | tuple):
            value, path = value[int(index[1])], path[index.end() :]
            continue
        if not isinstance(value, dict):
            raise LookupError(path)
        # Names may have dots.
        names = [name for name in value if re.match(rf"\.{re.escape(str(name))}(?=[.\[]|$)", path)]
        name = max(names, key=len, default=None)
        value, path = value[name], path[1 + len(str(name)) :]
    return value


def _with_text(error: Exception, content: bytes | str) -> str:
    """Return the message of msgspec's `error` with what stands around the byte that it is about."""
    message = str(error)
    place = re.search(r"\(byte (\d+)\)$", message)
    if place is None:
        return message
    if isinstance(content, str):
        content = content.encode("utf-8", "replace")
    byte = int(place[1])
    near = content[max(0, byte - SHOWN_BEFORE) : byte + SHOWN_FROM].decode("utf-8", "replace")
    return f"{message}, in {near!r}"
