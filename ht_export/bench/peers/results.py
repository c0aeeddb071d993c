"""The results file of `ht-bench peers`: conditions, what was tried, every measurement; written anew after each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from ht_export.bench.conditions import continued
from ht_export.formats import VersionedFormat
from runtime.files import write_json

FORMAT = "ht-bench-peers"
FORMAT_VERSION = 1

Count = Annotated[int, Meta(ge=0, le=1 << 60)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Entry:
    """One peer in one precision: `form` is what of the model it runs, whose files have `file_bytes`."""

    peer: str
    title: str
    precision: str
    version: str
    form: str
    file_bytes: Count


@dataclass(frozen=True)
class Tried:
    """One setting of an entry, as it was tried for so many clients: 0 tokens/s with a `cause` where it failed."""

    entry: str
    clients: Count
    setting: dict[str, Scalar]
    tokens_per_second: Seconds
    cause: str | None = None


@dataclass(frozen=True)
class Answered:
    """One prompt: its new tokens, of which `at_first` came with the first one, after `first_s`; all after `seconds`.

    `differs_at` is the first new token that is not the float32 model's, None for its own text.
    """

    tokens: Count
    at_first: Count
    first_s: Seconds
    seconds: Seconds
    differs_at: Count | None


@dataclass(frozen=True)
class Measured:
    """One measurement: all prompts, answered by one process for so many clients, in `seconds` in all."""

    entry: str
    clients: Annotated[int, Meta(ge=1, le=1 << 20)]
    round: Count
    setting: dict[str, Scalar]
    about: dict[str, Scalar]
    load_s: Seconds
    peak_bytes: Count
    seconds: Annotated[float, Meta(gt=0, le=1e12)]
    answers: Annotated[list[Answered], Meta(min_length=1)]


@dataclass(frozen=True)
class _File:
    format: Literal["ht-bench-peers"]
    version: int
    conditions: dict[str, Any]
    reference: list[list[Count]]
    entries: dict[str, Entry]
    tried: list[Tried]
    rows: list[Measured]

    def __post_init__(self) -> None:
        known = {one.entry for one in self.tried} | {row.entry for row in self.rows}
        if not known <= self.entries.keys():
            raise ValueError("it has measurements of what is none of its entries")
        if not isinstance(self.conditions.get("continued", []), list):
            raise ValueError("its conditions misstate the runs that continued it")


RESULTS = VersionedFormat(
    "file of results of ht-bench peers",
    most_bytes=1 << 28,
    remedy="delete it, or choose another --json",
    kind=_File,
    version=FORMAT_VERSION,
    again="choose another --json",
)


@dataclass
class Results:
    """What is known so far; with a `path`, it is written there whenever something is added.

    `reference` has the float32 model's tokens of each prompt. `left_out` and `failed` are of this run alone.
    """

    path: Path | None
    conditions: dict[str, Any]
    reference: list[list[int]] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    tried: list[Tried] = field(default_factory=list)
    rows: list[Measured] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    complete: bool = False

    def write(self) -> None:
        """Write the file, if there is one."""
        if self.path is not None:
            write_json(self.path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a JSON-ready dictionary."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "conditions": self.conditions,
            "complete": self.complete,
            "left_out": self.left_out,
            "failed": self.failed,
            "entries": {name: asdict(entry) for name, entry in self.entries.items()},
            "tried": [asdict(one) for one in self.tried],
            "rows": [asdict(one) for one in self.rows],
            "reference": self.reference,
        }

    def settings_of(self, entry: str, clients: int) -> list[Tried]:
        """Return what was tried of an entry for so many clients."""
        return [one for one in self.tried if (one.entry, one.clients) == (entry, clients)]

    def has(self, entry: str, clients: int, turn: int) -> bool:
        """Return whether this was measured."""
        return any((one.entry, one.clients, one.round) == (entry, clients, turn) for one in self.rows)


def opened(path: Path | None, conditions: dict[str, Any]) -> Results:
    """Return the results that are in the file at `path`, or empty ones. Raises `InputError` where the file is of other
    conditions.
    """
    if path is None or not path.exists():
        return Results(path, conditions)
    found = RESULTS.read(path)
    kept = continued(path, conditions, found.conditions)
    return Results(path, kept, found.reference, found.entries, found.tried, found.rows)
