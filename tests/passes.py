"""Passes of one request, in tests of engines."""

from __future__ import annotations

from typing import Protocol, TypeVar

from runtime.engines.protocol import Batch, Slot
from runtime.rows import Rows

ResultT = TypeVar("ResultT", covariant=True)


class Runs(Protocol[ResultT]):
    """An engine with results of its own kind."""

    def run(self, batch: Batch) -> ResultT: ...


def run_one(engine: Runs[ResultT], rows: Rows, slot: Slot) -> ResultT:
    """Return the result of a pass of one request."""
    return engine.run(Batch.of([rows], [slot]))
