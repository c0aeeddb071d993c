"""The engine protocol: run the rows of several requests in one pass, and keep those that were accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.bindings import GraphDims
from runtime.rows import Outputs, Phase, Rows


class Slot(Protocol):
    """A place in an engine's cache: the keys and values of one request's accepted rows, `length` of them, wherever the
    engine keeps them.
    """

    @property
    def length(self) -> int:
        """The number of committed rows."""
        ...


class Kept(Protocol):
    """Copies of `length` committed rows, that are in no slot."""

    @property
    def length(self) -> int:
        """The number of rows."""
        ...


@dataclass(frozen=True)
class Batch:
    """One pass over B requests in the same phase: the `rows` [B] that they want, and the `slots` [B] they are in."""

    rows: tuple[Rows, ...]
    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, rows: Sequence[Rows], slots: Sequence[Slot]) -> Batch:
        """Return the batch of these requests."""
        return cls(tuple(rows), tuple(slots))

    def __post_init__(self) -> None:
        assert len(self.rows) == len(self.slots) > 0, "each request is in one slot"
        assert len({rows.phase for rows in self.rows}) == 1, "a pass is in one phase"

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of committed rows of each request."""
        return tuple(slot.length for slot in self.slots)

    @property
    def phase(self) -> Phase:
        """The phase that all requests are in."""
        return self.rows[0].phase

    def __len__(self) -> int:
        return len(self.rows)


class Result(Protocol):
    """The outputs of one pass. They hold until the engine's next pass, and are refused when they no longer do."""

    @property
    def batch(self) -> Batch:
        """The batch that was run."""
        ...

    def outputs(self, index: int) -> Outputs:
        """Return the slice of request `index` of the batch."""
        ...


class Engine(Protocol):
    """Runs the graph of `dims` for up to `max_batch` requests at once, of up to `max_slots` that are under way.

    Where it `packs` a batch its time is that of all rows together; otherwise all requests of a batch are brought to the
    sizes of the largest. A committed row takes `row_bytes` bytes of memory. `gpu_name` is None on the CPU. Slots and
    results are of the engine's own kinds; those of another are refused by an assertion, as types that are tied to an
    engine would tie all that holds one to it too.
    """

    dims: GraphDims
    max_batch: int
    max_slots: int
    packs: bool

    @property
    def row_bytes(self) -> int:
        """The bytes of the keys and values of one row."""
        ...

    @property
    def gpu_name(self) -> str | None:
        """The GPU that passes run on."""
        ...

    def new_slot(self) -> Slot:
        """Return an empty slot of this engine's cache."""
        ...

    def keep(self, slot: Slot, rows: int) -> Kept:
        """Return copies of the first `rows` committed rows of `slot`. They are free when nothing refers to them."""
        ...

    def copy(self, source: Slot | Kept, target: Slot, rows: int) -> None:
        """Commit the first `rows` rows of `source`, a slot or kept rows, to the empty slot `target`."""
        ...

    def release(self, slot: Slot) -> None:
        """Free the memory of `slot`, which is used no more."""
        ...

    def run(self, batch: Batch) -> Result:
        """Run the rows of `batch` once, each over the committed rows of its slot, which stay as they are.

        Raises `InputError` for more rows than the engine takes.
        """
        ...

    def commit(self, result: Result, accepted: Sequence[Sequence[int]]) -> None:
        """Append the keys and values of the `accepted` tree rows of each request, in that order, to its slot; of a
        request that failed there are none.

        `result` is that of the engine's last pass, and is committed once, before anything is done with slots: the
        rows of a pass may not be where they were when one is made, copied to or released.
        """
        ...


class Freshness:
    """Tells whether a result is that of an engine's last pass, whose buffers the next pass uses again."""

    def __init__(self) -> None:
        self._passes = 0
        self._committed = 0

    def next_pass(self) -> int:
        """Return the number of the pass that begins: earlier ones no longer hold."""
        self._passes += 1
        return self._passes

    def check(self, number: int) -> None:
        """Raise `RuntimeError` unless pass `number` is the last one."""
        if number != self._passes:
            raise RuntimeError("the outputs of a pass are gone: the engine has run another one since")

    def commit(self, number: int) -> None:
        """Take note that pass `number` is committed. Raises `RuntimeError` when it is not the last, or was before."""
        self.check(number)
        if number == self._committed:
            raise RuntimeError("a pass is committed once, and this one was before")
        self._committed = number
