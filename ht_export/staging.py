"""The place of an engine: checked before the work, kept for one export, and filled when that has finished."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ht_export.alone import alone
from runtime.bundle.engine_file import ENGINE, EngineFile
from runtime.bundle.places import ENGINE_SUFFIXES, engine_file_path, placing_folder
from runtime.bundle.placing import CPU_SUFFIX, SUFFIXES, check_replaceable, complete, place
from runtime.errors import InputError
from runtime.files import RANDOM, check_name, check_readable, check_writable, unwritable

# Between the name of an engine and that of one export to its place.
STAGING = ".staging-"


def check_out(out: Path) -> None:
    """Raise `InputError` unless `out` names an engine file that can be written there."""
    longest = max(*SUFFIXES.get(out.suffix, ("",)), f".{out.suffix}{STAGING}{'-' * RANDOM}", key=len)
    check_name(out, longest)
    check_readable(out)
    if out.suffix not in ENGINE_SUFFIXES:
        raise InputError(
            f"{out}: the engine's name must end in .onnx (ONNX Runtime) or .plan (TensorRT), for example "
            f"{out.with_suffix('.onnx')}"
        )
    if out.name.endswith(CPU_SUFFIX):
        raise InputError(
            f"{out}: the graph for the CPU of another engine would have this name; choose another, for example "
            f"{out.with_name(out.name.removesuffix(CPU_SUFFIX) + '-cpu.onnx')}"
        )
    if any(one < " " or one in "\\\x7f" for one in out.name):
        raise InputError(f"{str(out)!r}: an engine's name has no backslash and no control character; choose another")
    check_writable(out)
    described = engine_file_path(out)
    other = out.with_suffix(".onnx" if out.suffix == ".plan" else ".plan")
    if described.is_file() and other.is_file():
        raise InputError(
            f"{described} belongs to {other.name}, and {out.name} would need one of the same name; choose another name "
            f"or folder, for example {out.parent / out.suffix[1:] / out.name}"
        )
    check_replaceable(out)


@contextlib.contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` for unfinished files, and remove it whatever happens.

    Raises `InputError` while another export to `out` is at work. What exports left there that were killed is completed
    or removed first.
    """
    with alone(out, f"another export to {out} is at work; wait until it has ended, or choose another name"):
        folder = _new_staging_folder(out)
        try:
            yield folder
        except OSError as error:
            if error.filename is not None and folder not in Path(os.fsdecode(error.filename)).parents:
                # Reading something else failed, such as the checkpoint.
                raise
            raise unwritable(out, error) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _new_staging_folder(out: Path) -> Path:
    """Return a new folder beside `out`, when nothing is left there of exports that were killed."""
    prefix = f".{out.name}{STAGING}"
    try:
        complete(out)
        # Nobody is at work in these: their exports would hold the lock.
        for folder in out.parent.glob(f"{glob.escape(prefix)}*"):
            shutil.rmtree(folder)
        for folder in _left_by_earlier_releases(out):
            shutil.rmtree(folder)
        return Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    except OSError as error:
        raise unwritable(out, error) from error


def _left_by_earlier_releases(out: Path) -> list[Path]:
    """Return folders of unfinished files as release 0.1.0 named them, known by holding files of this engine alone."""
    return [
        folder
        for folder in out.parent.glob(f".{glob.escape(out.name)}.????????")
        if folder.is_dir()
        and not folder.is_symlink()
        and folder != placing_folder(out)
        and all(path.is_file() and path.name.startswith(f"{out.stem}.") for path in folder.iterdir())
    ]


def put_in_place(folder: Path, out: Path, description: EngineFile) -> None:
    """Put the finished files of the staging folder in the place of the engine that was there; see
    `runtime.bundle.placing`. Raises `InputError` for an engine that would not load.
    """
    path = folder / engine_file_path(out).name
    description.write(path)
    ENGINE.read(path)
    place(folder, out)
