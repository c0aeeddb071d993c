"""The results file: conditions, every measured row and the summary, written anew after each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ht_export.bench.conditions import continued
from ht_export.bench.measure import Row
from ht_export.bench.settings import Job
from ht_export.bench.summary import summarise
from ht_export.formats import VersionedFormat
from runtime.files import write_json

FORMAT = "ht-bench"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class _File:
    """What of a results file a run continues."""

    format: Literal["ht-bench"]
    version: int
    conditions: dict[str, Any]
    rows: list[Row]

    def __post_init__(self) -> None:
        if not isinstance(self.conditions.get("continued", []), list):
            raise ValueError("its conditions misstate the runs that continued it")
        if any(row.layout != self.rows[0].layout for row in self.rows):
            raise ValueError("its rows are not measured alike")


RESULTS = VersionedFormat(
    "file of results of ht-bench run",
    most_bytes=1 << 28,
    remedy="delete it, or choose another --json",
    kind=_File,
    version=FORMAT_VERSION,
    again="choose another --json",
)


class Results:
    """The measurements so far, and their file, if there is one.

    A file of an earlier run of the same `jobs` under the same `conditions` is continued. Raises `InputError` when it is
    of something else.
    """

    def __init__(self, path: Path | None, conditions: dict[str, Any], jobs: Sequence[Job]) -> None:
        self._path = path
        self._jobs = jobs
        self.conditions = conditions
        self.rows: list[Row] = []
        if path is not None and path.exists():
            self._continue(path)

    @property
    def left(self) -> Sequence[Job]:
        """The jobs that are not measured yet."""
        return self._jobs[len(self.rows) :]

    def add(self, row: Row) -> None:
        """Add what was measured of the next job, and write the file. Raises `InputError` where the rows before it are
        measured otherwise.
        """
        if self._path and self.rows and row.layout != self.rows[0].layout:
            raise RESULTS.unfit(self._path, "its rows are not measured as those that are to follow")
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the file, if there is one."""
        if self._path is not None:
            write_json(self._path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a JSON-ready dictionary."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "conditions": self.conditions,
            "complete": not self.left,
            **summarise(self.rows),
            "rows": [row.to_dict() for row in self.rows],
        }

    def _continue(self, path: Path) -> None:
        found = RESULTS.read(path)
        self.rows = found.rows
        conditions = continued(path, self.conditions, found.conditions, goes_on=bool(self.left))
        asked = [(job.id, job.sampling.seed) for job in self._jobs[: len(self.rows)]]
        if [(row.id, row.seed) for row in self.rows] != asked:
            raise RESULTS.unfit(path, "its prompts are not those asked for")
        self.conditions = conditions
