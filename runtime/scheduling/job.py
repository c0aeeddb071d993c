"""A request on its way through the scheduler: its decoding, the slot that it is in, and who is told of its steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from runtime.decode import Accepted, Decoding, DecodingState, decode
from runtime.drafting.drafter import Offer
from runtime.engines.protocol import Slot
from runtime.rows import Outputs, Phase, Rows, prompt_rows
from runtime.sampling.choice import ArgMax
from runtime.tree import TreeSizes

_arrivals = itertools.count()


class Listener(Protocol):
    """Is told of what becomes of a job. What it raises in `stepped` ends the job alone, as `failed`."""

    def stepped(self, job: Job) -> None:
        """Tokens have become certain; `job.state.ended` tells whether they are the last."""
        ...

    def failed(self, job: Job, error: BaseException) -> None:
        """The job has ended by an error."""
        ...


class Nobody:
    """Listens to nothing; errors are raised."""

    def stepped(self, job: Job) -> None:
        """See `Listener.stepped`."""

    def failed(self, job: Job, error: BaseException) -> None:
        """See `Listener.failed`."""
        raise error


@dataclass(eq=False)
class Job:
    """One request: `state` is how far its text is. Of higher `priority` first; among equals the earlier `arrival`.

    `submitted` and `deadline` are times of `time.monotonic`. `most_rows` bounds the rows of its cache, those of a pass
    among them. While it runs it is in a `slot`, and `rows` are those that it wants next, or there is an `offer` to be
    cut to sizes; taken out of its slot it keeps them, and the rows before them are computed again. `cached` counts the
    tokens of the prompt whose rows were there already; `latest` is when its last token became certain.
    """

    state: DecodingState
    most_rows: int
    priority: int = 0
    deadline: float | None = None
    listener: Listener = field(default_factory=Nobody)
    arrival: int = field(default_factory=lambda: next(_arrivals))
    submitted: float = field(default_factory=time.monotonic)
    slot: Slot | None = None
    rows: Rows | None = None
    offer: Offer | None = None
    cached: int = 0
    preemptions: int = 0
    latest: float = 0.0
    _decoding: Decoding | None = None
    _replayed: Rows | None = None

    @property
    def started(self) -> bool:
        """Return whether it has run before."""
        return self._decoding is not None

    @property
    def reuses(self) -> bool:
        """Return whether it may begin with rows that were computed for another: where its prompt is scored it needs the
        logits of all of them, once.
        """
        return self.started or self.state.scores is None

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens of the prompt, and those chosen."""
        return [*self.state.prompt, *self.state.tokens]

    @property
    def replays(self) -> bool:
        """Return whether rows are missing that were committed before."""
        return self.slot is not None and self.slot.length < self.state.committed

    @property
    def decodes(self) -> bool:
        """Return whether it wants a step of decoding next, and no chunk of its prompt or of what it must replay."""
        return bool(self.state.tokens) and not self.replays

    @property
    def rows_to_prompt_end(self) -> int:
        """The rows of its prompt, or of what it must replay, that are still to be run."""
        assert self.slot is not None
        return (self.state.committed if self.replays else len(self.state.prompt)) - self.slot.length

    def begin(self, slot: Slot) -> None:
        """Go into `slot`, whose rows are those of the text's beginning."""
        self.slot = slot
        if self._decoding is None:
            self.state.committed = self.cached = slot.length
            self._decoding = decode(self.state)

    def leave(self) -> Slot:
        """Go out of the slot, and return it."""
        slot, self.slot = self.slot, None
        assert slot is not None
        return slot

    def prepare(self, chunk: int) -> None:
        """Have either `rows` to run next, up to `chunk` of its prompt or of what it must replay, or an `offer`."""
        assert self.slot is not None and self._decoding is not None
        state = self.state
        if self.replays:
            start = self.slot.length
            tokens = self.tokens[start : min(start + chunk, state.committed)]
            self._replayed = prompt_rows(tokens, state.join_order, start, wanted=ArgMax())
        elif self.rows is None and self.offer is None:
            assert state.committed == self.slot.length, "request and engine agree on what is committed"
            state.chunk = chunk
            found = next(self._decoding)
            if isinstance(found, Offer):
                self.offer = found
            else:
                assert isinstance(found, Rows), "what was accepted is followed by the next rows"
                self.rows = found

    def lay_out(self, sizes: TreeSizes | None = None) -> Rows:
        """Return the rows to run next; where there is an offer, those of `sizes`, or of its own with None."""
        if self.replays:
            assert self._replayed is not None
            return self._replayed
        if self.offer is not None:
            offer, self.offer = self.offer, None
            assert self._decoding is not None
            if sizes is None:
                sizes = self.state.drafter.sizing.choose(offer.tree, offer.length, offer.drafted)
            rows = self._decoding.send(sizes)
            assert isinstance(rows, Rows), "sizes are answered with rows"
            self.rows = rows
        assert self.rows is not None
        return self.rows

    def accept(self, rows: Rows, outputs: Outputs) -> Sequence[int]:
        """Hand over the outputs of `rows`, which were run; return those that became certain."""
        if rows is self._replayed:
            self._replayed = None
            assert rows.phase is Phase.PROMPT, "what is replayed is run as a prompt is"
            return range(len(rows.input_ids))
        assert self._decoding is not None
        self.rows = None
        accepted = self._decoding.send(outputs)
        assert isinstance(accepted, Accepted), "outputs are answered with what was accepted"
        return accepted.rows
