"""Where the files of an engine are: beside each other, or, while they are put in place, on the way there."""

from __future__ import annotations

from pathlib import Path

# How the names of engines end: of ONNX graphs, and of TensorRT plans.
ENGINE_SUFFIXES = (".onnx", ".plan")


def engine_file_path(engine: Path) -> Path:
    """Return where the description of `engine` is: `engine.onnx` has `engine.json` beside it."""
    return engine.with_suffix(".json")


def placing_folder(engine: Path) -> Path:
    """Return the folder that holds those files of a new `engine` that are not in their places yet; see
    `runtime.bundle.placing`.
    """
    return engine.with_name(f".{engine.name}.placing")


def candidates(engine: Path, name: str) -> tuple[Path, Path]:
    """Return where the file `name` of `engine` may be: it is the first of these that there is.

    A file moves from the first place to the second, so that one which is gone from there when it is looked for here is
    found all the same.
    """
    return placing_folder(engine) / name, engine.parent / name
