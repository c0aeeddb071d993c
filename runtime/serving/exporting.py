"""Engines of known models, exported the first time that they are asked for."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from runtime.bundle.places import ENGINE_SUFFIXES
from runtime.errors import InputError

CACHE_VARIABLE = "HT_CACHE"
# Names, and no paths: ht-export knows which there are.
KNOWN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")


class UnknownModelError(InputError):
    """What was given names neither an engine nor a model that can be exported."""


def engine_of(given: str, precision: str | None = None) -> Path:
    """Return the engine that `given` names: a file, or a model by a name of `ht-export`'s, exported now if it was not
    before, in another process. Raises `InputError`, and `UnknownModelError` for a name that nothing has.
    """
    path = Path(given)
    if path.suffix in ENGINE_SUFFIXES or path.exists() or not KNOWN.fullmatch(given):
        if precision is not None:
            raise InputError(f"--precision is for models that are exported; {given} is an engine")
        return path
    folder = cache_folder() / (given if precision is None else f"{given}-{precision}")
    engine = folder / "engine.onnx"
    if not engine.with_suffix(".json").is_file():
        _export(given, engine, precision)
    return engine


def cache_folder() -> Path:
    """Return where engines are kept: `HT_CACHE`, or `hidden-transfer` in the user's folder of caches."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "hidden-transfer"


def _export(model: str, engine: Path, precision: str | None) -> None:
    if not all(map(importlib.util.find_spec, ("ht_export", "torch"))):
        raise InputError(
            f"{model} is no engine file, and to export it takes the exporter; install it with: pip install "
            "'hidden-transfer[export]', or give an engine that was exported elsewhere"
        )
    command = [sys.executable, "-m", "ht_export.cli"]
    known = subprocess.run([*command, "--known-models"], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    if model not in known:
        raise UnknownModelError(
            f"{model} is no engine file, and no model that ht-export knows ({', '.join(known)}); give one of these, or "
            "an engine that was made with: ht-export MODEL --out engine.onnx"
        )
    try:
        engine.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{engine.parent} cannot be made ({error.strerror}); set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    print(f"ht-serve: exporting {model} to {engine}, once", file=sys.stderr, flush=True)
    options = [] if precision is None else ["--precision", precision]
    # Its output goes to stderr: stdout is the server's.
    done = subprocess.run([*command, model, "--out", str(engine), *options], stdout=sys.stderr.fileno(), check=False)
    if done.returncode:
        raise InputError(f"{model} could not be exported; see above")
