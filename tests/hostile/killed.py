"""Run by `test_placing.py`: places an engine once for each of its file operations, killed just before that one.

python -m tests.hostile.killed OLD NEW FOLDER: folders with an engine each, OLD may be empty; prints a JSON list with
the operation that each was killed at and what was found afterwards: "old", "new", "none", or an error.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ht_export.staging import put_in_place, staging_folder
from runtime.bundle.engine_file import read_engine_file
from runtime.bundle.places import engine_file_path
from runtime.bundle.reading import read_bundle
from runtime.errors import InputError

# Audit events of operations on files, all raised before the operation is done.
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink")


def kill_before(number: int, report: Callable[[str], None]) -> None:
    """Let this process be killed before its file operation `number`, from 0, which is reported."""
    count = 0

    def operation(name: str) -> None:
        nonlocal count
        if count == number:
            report(name)
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            operation(f"{event} {Path(os.fsdecode(arguments[0])).name if isinstance(arguments[0], str) else ''}")

    # Python tells nothing of this one.
    fsync = os.fsync

    def audited_fsync(handle: int) -> None:
        operation("fsync")
        fsync(handle)

    os.fsync = audited_fsync  # type: ignore[assignment]
    sys.addaudithook(audit)


def install(new: Path, engine: Path) -> None:
    """Do what an export does when it has finished."""
    about = read_engine_file(new)
    with staging_folder(engine) as folder:
        for path in new.parent.iterdir():
            if path != engine_file_path(new) and not path.name.endswith(".tuning.json"):
                shutil.copyfile(path, folder / path.name)
        put_in_place(folder, engine, about)


def killed_at(number: int, new: Path, engine: Path) -> str | None:
    """Install `new` in another process, killed before file operation `number`; return that, None if it was done."""
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        try:
            kill_before(number, lambda name: (os.write(sink, name.encode()), None)[1])
            install(new, engine)
        finally:
            os._exit(0)
    os.close(sink)
    with os.fdopen(source, "rb") as told:
        name = told.read().decode()
    _, status = os.waitpid(child, 0)
    return name if os.WIFSIGNALED(status) else None


def found(engine: Path, old: str | None, new: str) -> str:
    """Return which engine loads."""
    try:
        identity = read_bundle(engine).about.identity
    except InputError as error:
        return "none" if old is None and "no engine at" in str(error) else str(error)
    return {old: "old", new: "new"}[identity]


def main() -> None:
    """Print what was found."""
    old, new, folder = (Path(argument) / "engine.onnx" for argument in sys.argv[1:])
    was = read_engine_file(old).identity if old.is_file() else None
    becomes = read_engine_file(new).identity
    results = []
    for number in range(10_000):
        work = folder.parent / str(number)
        shutil.copytree(old.parent, work)
        engine = work / old.name
        operation = killed_at(number, new, engine)
        first = found(engine, was, becomes)
        # The next export finds the place as it must be.
        with staging_folder(engine):
            pass
        again = found(engine, was, becomes)
        left = sorted(path.name for path in work.iterdir() if path.name.startswith("."))
        results.append([operation, first, again, left])
        shutil.rmtree(work)
        if operation is None:
            break
    print(json.dumps(results))


if __name__ == "__main__":
    main()
