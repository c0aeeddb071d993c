"""The record of `ht-train all` in its work folder: what was asked for, what was chosen, and which stages are done."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from ht_export.formats import VersionedFormat
from ht_export.training.identity import first_difference
from ht_export.training.recipe.choices import Choices
from runtime.checks import MOST_REPEATS
from runtime.errors import InputError, shown
from runtime.files import write_json

RECORD = "all.json"
RECORD_VERSION = 1

Repeats = Annotated[int, Meta(ge=1, le=MOST_REPEATS)]


@dataclass(frozen=True)
class Pace:
    """Optimizer steps of a fit, with the steps between measurements and between checkpoints. `seconds_per_step` is
    None where nobody measured.
    """

    steps: Repeats
    evaluate_every: Repeats
    checkpoint_every: Repeats
    seconds_per_step: Annotated[float, Meta(ge=0, le=1e12)] | None = None


@dataclass(frozen=True)
class Record:
    """A run so far. `asked` are its options, which the command that continues it must repeat; `done` has a fingerprint
    of what each finished stage left.
    """

    version: int
    asked: dict[str, Any]
    choices: Choices | None = None
    pace: Pace | None = None
    done: dict[str, str] = field(default_factory=dict)


RECORDS = VersionedFormat(
    "record of ht-train all",
    most_bytes=1 << 20,
    remedy="delete its folder to begin again",
    kind=Record,
    version=RECORD_VERSION,
    again="delete its folder to begin again",
)


class WorkFolder:
    """The work folder of a run, and its record, written whenever it changes.

    Raises `InputError` where the folder is of a run that was asked for something else.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path = path
        file = path / RECORD
        if not file.is_file():
            self.record = Record(RECORD_VERSION, asked)
            return
        self.record = RECORDS.read(file)
        differing = first_difference(asked, self.record.asked)
        if differing:
            raise InputError(
                f"{path} is the work of a run with another {differing} ({shown(self.record.asked.get(differing))}, now "
                f"{shown(asked.get(differing))}); repeat that, name another --work, or delete the folder to begin again"
            )

    def choose(self, choices: Choices) -> None:
        """Keep what was chosen."""
        self._write(replace(self.record, choices=choices))

    def set_pace(self, pace: Pace) -> None:
        """Keep how long the fits are."""
        self._write(replace(self.record, pace=pace))

    def finish(self, stage: str, fingerprint: str) -> None:
        """Keep that a stage is done."""
        self._write(replace(self.record, done={**self.record.done, stage: fingerprint}))

    def _write(self, record: Record) -> None:
        self.record = record
        write_json(self.path / RECORD, asdict(record))
