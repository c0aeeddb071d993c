"""What a search of blocks has evaluated so far, in a file, so that the same command goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from ht_export.formats import PythonJsonFormat
from ht_export.model.blocks import MOST_DRAFTED, Blocks, Layers
from ht_export.training.identity import first_difference
from ht_export.training.skip_search import Block, Found
from runtime.errors import InputError, shown
from runtime.files import write_json

Share = Annotated[float, Meta(ge=0, le=1)]
# Above any model's.
Factor = Annotated[float, Meta(ge=0, le=1e6)]


@dataclass(frozen=True)
class _Evaluated:
    """A `Found`, with its blocks by kind."""

    attention: Layers
    mlp: Layers
    draft_tokens: Annotated[int, Meta(ge=1, le=MOST_DRAFTED)]
    confidence: Share
    speedup: Factor
    tokens_per_step: Factor
    agreement: Share
    draft_cost: Share

    def found(self) -> Found:
        # In order and once each, whatever the file says.
        blocks = Blocks.of(sorted(set(Blocks(tuple(self.attention), tuple(self.mlp)).chosen)))
        figures = {name: value for name, value in asdict(self).items() if name not in ("attention", "mlp")}
        return Found(blocks, **figures)


@dataclass(frozen=True)
class _Record:
    """What was evaluated, and `run`, on which that depends."""

    run: dict[str, Any]
    evaluated: list[_Evaluated]


RECORDS = PythonJsonFormat(
    "record of ht-train skip-blocks", 1 << 26, "delete it to search from the beginning", kind=_Record
)


class SearchRecord:
    """The sets evaluated so far, at `path`. `run` is what an evaluation depends on: another one's record is refused
    with an `InputError`.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path, self.run = path, dict(run)
        self.evaluated: dict[frozenset[Block], Found] = {}
        if not path.is_file():
            return
        record = RECORDS.read(path)
        if differing := first_difference(self.run, record.run):
            raise InputError(
                f"{path} is the record of a search with another {differing} "
                f"({shown(record.run.get(differing))}, now {shown(self.run.get(differing))}); repeat that, choose "
                "another --out, or delete it to search from the beginning"
            )
        for one in record.evaluated:
            found = one.found()
            self.evaluated[frozenset(found.blocks.chosen)] = found

    def add(self, found: Found) -> None:
        """Keep one more."""
        self.evaluated[frozenset(found.blocks.chosen)] = found
        evaluated = []
        for one in self.evaluated.values():
            figures = asdict(one)
            evaluated.append({**figures.pop("blocks"), **figures})
        write_json(self.path, {"run": self.run, "evaluated": evaluated})
