"""The engine protocol: run the rows of several requests in one pass, and keep those that were accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.bindings import GraphDims
from runtime.rows import Outputs, Phase, Rows


class Slot(Protocol):
    """A place in an engine's cache: the keys and values of one request's accepted rows, `length` of them, wherever the
    engine keeps them. It is free again when nothing refers to it.
    """

    @property
    def length(self) -> int:
        """The number of committed rows."""
        ...


@dataclass(frozen=True)
class Batch:
    """One pass over B requests in the same `phase`: the `rows` [B] that each wants, and the `slots` [B] that they are
    in.
    """

    phase: Phase
    rows: tuple[Rows, ...]
    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, rows: Sequence[Rows], slots: Sequence[Slot]) -> Batch:
        """Return the batch of requests in the same phase."""
        (phase,) = {one.phase for one in rows}
        assert len(rows) == len(slots), "each request is in one slot"
        return cls(phase, tuple(rows), tuple(slots))

    def __len__(self) -> int:
        return len(self.rows)


class Result(Protocol):
    """The outputs of one pass. They hold until the engine's next pass."""

    @property
    def batch(self) -> Batch:
        """The batch that was run."""
        ...

    def outputs(self, index: int) -> Outputs:
        """Return the slice of request `index` of the batch."""
        ...


class Engine(Protocol):
    """Runs the graph of `dims` for up to `max_batch` requests at once."""

    dims: GraphDims
    max_batch: int

    def new_slot(self) -> Slot:
        """Return an empty slot of this engine's cache."""
        ...

    def run(self, batch: Batch) -> Result:
        """Run the rows of `batch` once, each over the committed rows of its slot, which stay as they are.

        Raises `InputError` for more rows than the engine takes.
        """
        ...

    def commit(self, result: Result, accepted: Sequence[Sequence[int]]) -> None:
        """Append the keys and values of the `accepted` tree rows of each request, in that order, to its slot.

        `result` is that of the engine's last pass.
        """
        ...
