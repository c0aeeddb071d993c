"""Runs requests to their end: each says which rows it wants, an engine runs them together, all take their slice."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from runtime.decode import Accepted, DecodingState, decode
from runtime.engines.protocol import Batch, Engine, Slot
from runtime.rows import Outputs, Phase, Rows


def run(engine: Engine, requests: Sequence[DecodingState]) -> Iterator[None]:
    """Run `requests` to their end, all of them one step further before any takes the next; yield after each step.

    What a step made certain is in `DecodingState.tokens`. A step is one pass for each phase that requests are in, or several
    where an engine takes fewer of them at once. Requests wait in order until the engine has a slot for them.
    """
    waiting = deque(requests)
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < engine.max_slots:
            running.append(_Running(waiting.popleft(), engine.new_slot()))
        for group in _groups(running, engine.max_batch):
            batch = Batch.of([one.rows for one in group], [one.slot for one in group])
            result = engine.run(batch)
            engine.commit(result, [one.accept(result.outputs(index)) for index, one in enumerate(group)])
        yield
        running = [one for one in running if not one.request.ended]
        for one in running:
            one.propose()


class _Running:
    """A request under way in its slot, and the `rows` that it wants next."""

    rows: Rows

    def __init__(self, request: DecodingState, slot: Slot) -> None:
        self.request = request
        self.slot = slot
        self._decoding = decode(request)
        self.propose()

    def propose(self) -> None:
        """Ask for the next rows."""
        rows = next(self._decoding)
        assert isinstance(rows, Rows), "what was accepted is followed by the next rows"
        assert self.request.committed == self.slot.length, "request and engine agree on what is committed"
        self.rows = rows

    def accept(self, outputs: Outputs) -> Sequence[int]:
        """Hand over the outputs of the rows; return the rows that became certain."""
        accepted = self._decoding.send(outputs)
        assert isinstance(accepted, Accepted), "outputs are answered with what was accepted"
        return accepted.rows


def _groups(running: Sequence[_Running], most: int) -> Iterator[list[_Running]]:
    """Yield requests that may run in one pass: of the same phase, at most `most` of them."""
    for phase in Phase:
        group = [one for one in running if one.rows.phase is phase]
        for start in range(0, len(group), most):
            yield group[start : start + most]
