"""The results of a day on a GPU, `day.json`: written whole after everything that is found."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ht_export.gpu_day.own_files import read_json
from ht_export.gpu_day.pieces import MEBIBYTE, Split, join, missing, split
from runtime.errors import InputError
from runtime.files import write_json

FILE = "day.json"
VERSION = 1
# Files that come back are at most so large each.
MOST_BYTES = 15 * MEBIBYTE
# What became of a section.
DONE, FAILED, SKIPPED, NOT_ON_CPU = "done", "failed", "skipped", "not on a CPU"
# With these there is nothing left to do.
ENOUGH = (DONE, NOT_ON_CPU)


class DayResults:
    """What was found so far, by stage and section. A section's value has an "error" where it failed, and "skipped"
    where what it needs was not there.

    Raises `InputError` where the folder has something else, or the results of another device.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self.path = folder / FILE
        self.content: dict[str, Any] = {
            "version": VERSION,
            "device": device,
            "rehearsal": device == "cpu",
            "runs": [],
            "stages": {},
            "kept": [],
        }
        if self.path.is_file():
            self.content |= read_json(self.path, "name another --results", VERSION)
            if self.content["device"] != device:
                raise InputError(
                    f"{self.path} has results of the device {self.content['device']}, and this run is on {device}; "
                    "name another --results"
                )

    def begin(self, about: dict[str, Any]) -> None:
        """Take note of a run, and of what it runs on."""
        self.content["runs"].append({**about, "device": self.content["device"], "seconds": 0.0})
        self.write()

    def sections(self, stage: str) -> dict[str, Any]:
        """Return what was found of a stage, by section."""
        found: dict[str, Any] = self.content["stages"].get(stage, {}).get("sections", {})
        return found

    def done(self, stage: str) -> list[str]:
        """Return the sections of a stage that need not be run again."""
        return [name for name, value in self.sections(stage).items() if state_of(value) in ENOUGH]

    def is_done(self, stage: str) -> bool:
        """Return whether all sections of a stage were found."""
        return bool(self.content["stages"].get(stage, {}).get("complete"))

    def put(self, stage: str, section: str, value: dict[str, Any]) -> None:
        """Keep what was found."""
        self._stage(stage)["sections"][section] = value
        self.write()

    def end(self, stage: str, *, complete: bool, seconds: float, stopped: str | None = None) -> None:
        """Take note of the end of a stage in this run, and of what stopped it."""
        kept = self._stage(stage)
        kept["complete"] = complete and all(state_of(value) in ENOUGH for value in kept["sections"].values())
        kept["seconds"] = round(kept["seconds"] + seconds, 1)
        kept["stopped"] = stopped
        self.write()

    def keep(self, files: list[Path]) -> None:
        """Keep copies of these files and no others, in pieces, which come back with the results; see `restore`."""
        before = [Split.of_json(one, self.path) for one in self.content["kept"]]
        described = [split(path, self.folder, [MOST_BYTES]) for path in files]
        names = {piece.name for one in described for piece in one.pieces}
        for piece in (piece for one in before for piece in one.pieces):
            if piece.name not in names:
                (self.folder / piece.name).unlink(missing_ok=True)
        self.content["kept"] = [one.to_json() for one in described]
        self.write()

    def restore(self, work: Path) -> list[str]:
        """Put kept files back into `work`, where they are not there; return their names."""
        found = []
        for one in self.content["kept"]:
            described = Split.of_json(one, self.path)
            target = work / described.name
            if not target.exists() and not missing(described, [self.folder]):
                join(described, [self.folder], target)
                found.append(described.name)
        return found

    def write(self) -> None:
        """Write all of it."""
        if self.content["runs"]:
            run = self.content["runs"][-1]
            run["seconds"] = round(time.time() - run["began"], 1)
        write_json(self.path, self.content)

    def _stage(self, stage: str) -> dict[str, Any]:
        empty = {
            "device": self.content["device"],
            "rehearsal": self.content["rehearsal"],
            "complete": False,
            "seconds": 0.0,
            "stopped": None,
            "sections": {},
        }
        found: dict[str, Any] = self.content["stages"].setdefault(stage, empty)
        return found


def state_of(value: Any) -> str:
    """Return whether a section, of which this was found, is done, failed, skipped or nothing to rehearse."""
    if not isinstance(value, dict):
        return DONE
    names = {"error": FAILED, "skipped": SKIPPED, "not_on_a_cpu": NOT_ON_CPU}
    return next((state for name, state in names.items() if name in value), DONE)
