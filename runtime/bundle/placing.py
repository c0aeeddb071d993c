"""How the files of an engine are put in place: at every instant either the old engine or the new one loads.

An engine has several files, and no file system replaces several at once. So there is one instant that decides: a
folder with all of the new files, `engine.json` among them, is renamed to `.engine.onnx.placing` beside the engine. From
then on the new engine is what loads. Its files are then moved out of that folder, `engine.json` last. A reader looks
for `engine.json`, and for each file that it names, in that folder first and then beside the engine: so what a reader
finds does not depend on how far the moving is, or whether it was cut short. The next export to this place completes it.

Files are renamed, never written in place: who has one open keeps what it has.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.bundle.engine_file import FORMAT
from runtime.bundle.places import engine_file_path, placing_folder
from runtime.bundle.tuning_file import holds_tunings, tuning_path
from runtime.errors import EngineFileError, InputError
from runtime.formats import JsonFormat

# Suffix of the graph lowered for the CPU, in the place of the engine's own.
CPU_SUFFIX = ".cpu.onnx"
# Suffixes, in the place of the engine's own, of all files that an engine may have besides `engine.json` and itself.
EVERY = (".tokenizer.json", ".chat_template.jinja", ".correction.npy", ".draft_tokens.npy")
SUFFIXES = {
    ".onnx": (".onnx.data", CPU_SUFFIX, *EVERY),
    ".plan": (".kernels.bin", *EVERY),
}


@dataclass(frozen=True)
class NamedFile:
    """A file that `engine.json` names."""

    name: str


@dataclass(frozen=True)
class NamedKernels:
    """The part of a plan's description that names a file."""

    kernels: NamedFile


@dataclass(frozen=True)
class NamedFiles:
    """The files that `engine.json` of any release names."""

    format: Literal["hidden-transfer-engine"]
    graph: NamedFile
    cpu_graph: NamedFile | None = None
    weights: NamedFile | None = None
    tokenizer: NamedFile | None = None
    chat_template: NamedFile | None = None
    correction: NamedFile | None = None
    draft_tokens: NamedFile | None = None
    plan: NamedKernels | None = None

    @property
    def names(self) -> set[str]:
        """The names of the files."""
        files = (self.graph, self.cpu_graph, self.weights, self.tokenizer, self.chat_template)
        drafts = (self.correction, self.draft_tokens)
        return {file.name for file in (*files, *drafts, self.plan and self.plan.kernels) if file}


assert FORMAT in NamedFiles.__annotations__["format"]
ANOTHER_NAME = "move it away, or choose another name"
NAMED_FILES = JsonFormat(
    "engine.json of any release", most_bytes=16 << 20, remedy=ANOTHER_NAME, error=EngineFileError, kind=NamedFiles
)


def own_names(engine: Path) -> set[str]:
    """Return the names of files beside `engine` that its `engine.json` proves to be an engine's of ours; none where
    there is no such file, or it is another.
    """
    description, tunings = engine_file_path(engine), tuning_path(engine)
    found: set[str] = set()
    try:
        # A description may name its engine's files only.
        found = {name for name in NAMED_FILES.read(description).names if name.startswith(f"{engine.stem}.")}
        found.add(description.name)
    except InputError:
        return set()
    with contextlib.suppress(InputError):
        if holds_tunings(tunings):
            found.add(tunings.name)
    return found


def check_apart(output: Path, engines: Iterable[Path], others: Iterable[Path | None] = ()) -> None:
    """Raise `InputError` where writing `output` would replace a file of the `engines` that are read, or of `others`."""
    beside = [engine.with_name(name) for engine in engines for name in own_names(engine)]
    for file in (*engines, *beside, *others):
        if file is not None and output.exists() and file.exists() and output.samefile(file):
            raise InputError(f"{output} is read here, and what is written would replace it; choose another name")


def check_replaceable(engine: Path) -> None:
    """Raise `InputError` for what is in the way of `engine`: anything that has the name of one of its files and is not
    a file of an engine of ours.
    """
    suffixes = (*SUFFIXES[engine.suffix], ".json", ".tuning.json")
    names = [engine.name, *(f"{engine.stem}{suffix}" for suffix in suffixes)]
    # An export may have been killed when its first files were in place.
    own = own_names(engine) | own_names(placing_folder(engine) / engine.name)
    for name in names:
        path = engine.with_name(name)
        if not os.path.lexists(path) or (name in own and not path.is_dir()):
            continue
        raise InputError(
            f"{path} is in the way: it is not a file of an engine that {engine_file_path(engine).name} describes; "
            f"{ANOTHER_NAME}"
        )


def place(staged: Path, engine: Path) -> None:
    """Put the files of `staged`, a folder beside `engine` that has its `engine.json`, in the place of the engine that
    was there. Raises `InputError` for what is in the way, see `check_replaceable`.
    """
    for path in staged.iterdir():
        path.chmod(0o644)
        _write_through(path)
    _write_through(staged)
    check_replaceable(engine)
    staged.rename(placing_folder(engine))
    _write_through(engine.parent)
    complete(engine)


def complete(engine: Path) -> None:
    """Do what is left of placing `engine`, where something is left; see `place`."""
    moving = placing_folder(engine)
    description = moving / engine_file_path(engine).name
    if description.is_file():
        obsolete = own_names(engine) - own_names(moving / engine.name) - {description.name}
        for path in moving.iterdir():
            if path != description:
                path.replace(engine.parent / path.name)
        for name in obsolete:
            (engine.parent / name).unlink(missing_ok=True)
        description.replace(engine_file_path(engine))
        _write_through(engine.parent)
    if moving.is_dir():
        shutil.rmtree(moving)


def _write_through(path: Path) -> None:
    """Wait until the file or folder is on the disk: after a crash no name may be there without its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot do it for folders.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)
