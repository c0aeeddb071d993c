"""Cases of hostile input, and kinds of them: what is generated, and who reads it in production."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

# A name of the environment whose value nothing that is read may get at.
SECRET_NAME = "HIDDEN_TRANSFER_SECRET"
SECRET = "the-secret-of-the-environment"


@dataclass(frozen=True)
class Case:
    """One hostile input: `files` by name, None for one that is missing, in place of the valid ones; or what is `asked`.

    `exchanged` is of a file whose recorded hash was left as it was: nothing but an error will do.
    """

    files: Mapping[str, bytes | None] = field(default_factory=dict)
    asked: Any = None
    exchanged: bool = False

    def put(self, folder: Path) -> None:
        """Write the files into `folder`."""
        for name, content in self.files.items():
            path = folder / name
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)

    @property
    def size(self) -> int:
        """About how long the case is: smaller ones are easier to understand."""
        return sum(len(content or b"") for content in self.files.values()) + len(pickle.dumps(self.asked))


@dataclass(frozen=True)
class Kind:
    """A kind of hostile input: what generates `cases`, and `use`, which reads one in production and uses what was read.

    `folder` has valid files, and those of a case when `use` is called with it. `use` raises `InputError` or nothing; a
    text and plain decoding of it that differ are a `FaultError`, too. `valid` is a case that is no error.
    """

    folder: Path
    cases: st.SearchStrategy[Case]
    use: Callable[[Case], object]
    valid: Case = Case()


@dataclass(frozen=True)
class Maker:
    """What makes a kind of hostile input: `formats` are the names of those that are read so, `make` is called with the
    folder for its valid files.
    """

    formats: tuple[str, ...]
    make: Callable[[Path], Kind]


class Kinds(dict[str, Maker]):
    """Kinds of hostile input by name."""

    def add(self, name: str, *formats: str) -> Callable[[Callable[[Path], Kind]], Callable[[Path], Kind]]:
        """Return a decorator that adds what makes a kind."""

        def added(make: Callable[[Path], Kind]) -> Callable[[Path], Kind]:
            self[name] = Maker(formats, make)
            return make

        return added


class FaultError(Exception):
    """What should not be."""


def valid_files(folder: Path) -> dict[str, bytes]:
    """Return the files of `folder` by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def load_json(path: Path) -> dict:
    """Return the object in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
