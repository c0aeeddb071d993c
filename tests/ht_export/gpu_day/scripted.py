"""Stages for tests of how stages are run: they are imported in processes of their own."""

from __future__ import annotations

import os
import time
from typing import Any

from ht_export.gpu_day.settings import DaySettings, NotHereError
from ht_export.gpu_day.stages import Sections, Stage


def stage(function: str, limit: int = 60, least: int = 0) -> Stage:
    """Return the stage of one of the functions below."""
    return Stage(function, 1, "of a test", 1, limit, least, __name__, function)


def _note(settings: DaySettings, name: str) -> dict[str, Any]:
    """Return the process that ran a section, and write down that it was run."""
    settings.work.mkdir(exist_ok=True)
    with (settings.work / "ran").open("a") as file:
        file.write(f"{name}\n")
    return {"process": os.getpid()}


def ran(settings: DaySettings) -> list[str]:
    """Return the sections that were run so far."""
    path = settings.work / "ran"
    return path.read_text().split() if path.is_file() else []


def right(settings: DaySettings) -> Sections:
    yield "first", lambda: _note(settings, "first")
    yield "second", lambda: _note(settings, "second")


def broken(settings: DaySettings) -> Sections:
    def wrong() -> dict[str, Any]:
        _note(settings, "wrong")
        if not (settings.work / "mended").exists():
            raise RuntimeError("SM 90 is refused")
        return {}

    yield "before", lambda: _note(settings, "before")
    yield "wrong", wrong
    yield "after", lambda: _note(settings, "after")


def crashing(settings: DaySettings) -> Sections:
    def crash() -> dict[str, Any]:
        os._exit(3)

    yield "crash", crash
    yield "after", lambda: _note(settings, "after")


def hanging(settings: DaySettings) -> Sections:
    def hang() -> dict[str, Any]:
        time.sleep(600)
        return {}

    yield "before", lambda: _note(settings, "before")
    yield "hang", hang
    yield "after", lambda: _note(settings, "after")


def lacking(settings: DaySettings) -> Sections:
    def needed() -> dict[str, Any]:
        if not (settings.work / "carried").exists():
            raise NotHereError("the weights are not here")
        return {}

    def execute() -> dict[str, Any]:
        settings.on_gpu_only("executing a plan")
        return {}

    yield "needed", needed
    yield "gpu", execute


def unimportable(settings: DaySettings) -> Sections:
    raise ModuleNotFoundError("No module named 'triton'")
