"""The results file: conditions, every measured row and the summary, written anew after each prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ht_export.bench.conditions import differences
from ht_export.bench.measure import Row
from ht_export.bench.settings import Job
from ht_export.bench.summary import summarise
from runtime.errors import InputError
from runtime.files import write_json

FORMAT = "ht-bench"
FORMAT_VERSION = 1


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
        """Add what was measured of the next job, and write the file."""
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
        found = _read(path)
        then = found["conditions"]
        if differing := differences(self.conditions, then):
            raise InputError(
                f"{path} holds results under other conditions: {'; '.join(differing)}; repeat the earlier command to "
                "continue it, or choose another --json"
            )
        try:
            self.rows = [Row.from_dict(row) for row in found["rows"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, error) from error
        asked = [(job.id, job.sampling.seed) for job in self._jobs[: len(self.rows)]]
        if [(row.id, row.seed) for row in self.rows] != asked:
            raise _damaged(path, "its prompts are not those asked for")
        earlier = {key: then.get(key) for key in ("date", "commit")}
        now = {key: self.conditions[key] for key in earlier}
        runs = then.get("continued", [])
        if self.left and now not in [earlier, *runs]:
            runs = [*runs, now]
        self.conditions = {**then, **({"continued": runs} if runs else {})}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("version") != FORMAT_VERSION:
        raise InputError(f"{path} does not hold results of this version of ht-bench run; choose another --json")
    if not isinstance(found.get("conditions"), dict) or not isinstance(found.get("rows"), list):
        raise _damaged(path, "its conditions or rows are missing")
    return found


def _damaged(path: Path, why: object) -> InputError:
    return InputError(f"{path} is damaged ({why}); delete it, or choose another --json")
