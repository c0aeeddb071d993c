"""Writing files so that a reader sees the old file or the new one, never half of either; and hashing them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import InputError

# Bytes of a file's name, where a file system does not say, and of a whole path, as Linux counts them.
LONGEST_NAME = 255
LONGEST_PATH = 4095
# Characters that `tempfile` adds to a prefix.
RANDOM = 8


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_name(path: Path, longest_suffix: str = "") -> None:
    """Raise `InputError` unless the file system can have files of the name of `path`, and of its stem with
    `longest_suffix`: the longest of the suffixes that others beside it have, such as ".chat_template.jinja".
    """
    _check_characters(path)
    if not path.name:
        raise InputError(f"{path} is a folder; give the name of a file")
    most = _longest_name(path)
    for folder in path.parts[:-1]:
        if _size(folder) > most:
            raise InputError(
                f"{_shortened(path)}: a folder's name has {_size(folder)} bytes, and {most} are allowed; choose a "
                "shorter one"
            )
    added = max(0, _size(path.stem + longest_suffix) - _size(path.name))
    if _size(path.name) + added > most:
        beside = f", for names beside it have up to {added} more" if added else ""
        raise InputError(
            f"{_shortened(path)}: the file's name has {_size(path.name)} bytes, and {most - added} are "
            f"allowed{beside}; choose a shorter one"
        )
    # Files are written in a folder of a longer name before they are put there.
    room = LONGEST_PATH - 2 * RANDOM - _size(path.name) - added
    if _size(path) > room:
        raise InputError(
            f"{_shortened(path)}: the path has {_size(path)} bytes, and {room} are allowed; choose a shorter one"
        )


def check_readable(path: Path) -> None:
    """Raise `InputError` where libraries in C++ and Rust cannot be told of `path`: they take names in UTF-8 only."""
    _check_characters(path)
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{str(path)!r}: the name is not in UTF-8; rename the file or folder") from error


def temporary_prefix(path: Path) -> str:
    """Return a prefix for `tempfile` in the folder of `path` that tells what the file is for; of a long name, its
    beginning.
    """
    name, most = path.name, _longest_name(path) - RANDOM
    while _size(f".{name}.") > most:
        name = name[:-1]
    return f".{name}."


def _check_characters(path: Path) -> None:
    if "\0" in str(path):
        raise InputError(f"{str(path)!r} has a character of code 0, which no file's name can have; choose another")


def _longest_name(path: Path) -> int:
    """Return how many bytes a name may have in the folder of `path`, or where that is to be made."""
    for folder in path.absolute().parents:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return os.pathconf(folder, "PC_NAME_MAX")
    return LONGEST_NAME


def _size(path: str | Path) -> int:
    return len(os.fsencode(path))


def _shortened(path: Path) -> str:
    """Return a path as messages show it."""
    return text if len(text := str(path)) <= 100 else f"{text[:30]}...{text[-60:]}"


def _check_replaceable(path: Path) -> None:
    """Raise `InputError` for what a file must not take the place of."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a device or a pipe; give the name of a file")


def check_writable(path: Path) -> None:
    """Raise `InputError` unless a file can be made at `path`: asked before long work, so that none is lost."""
    check_name(path)
    try:
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise unwritable(path, error) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place when the block succeeds, remove it when not.

    Raises `InputError` when the folder cannot be written or the disk is full, and for a name that cannot be.
    """
    check_name(path)
    try:
        # A name such as /dev/null would be lost to the whole machine.
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=temporary_prefix(path), dir=path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. JSON has no infinity and no NaN: they become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        # What no UTF-8 can hold, such as a path's name that is not in it, becomes an escape of JSON.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _finite(value: Any) -> Any:
    """Return `value` with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def unwritable(path: Path, error: OSError) -> InputError:
    """Return the error that tells a user why `path` could not be written."""
    return InputError(f"cannot write {path}: {error.strerror or error}; choose a writable folder with free space")
