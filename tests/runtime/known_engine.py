"""An engine whose base model and drafts are known functions of the text: tests of logic need no tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import bindings
from runtime.bindings import GraphDims
from runtime.decode import DecodingState
from runtime.drafting.drafter import Drafter
from runtime.engines.host_cache import HostCacheEngine, HostResult, cache_of
from runtime.engines.layout import stack
from runtime.engines.protocol import Batch, Engine
from runtime.scheduling.job import Job
from runtime.scheduling.scheduler import Limits, run
from runtime.scheduling.slots import MANY

Text = tuple[int, ...]
# Returns the base model's logits [V] after a text.
Logits = Callable[[Text], NDArray[np.float32]]
# Returns the draft logits [V_d] of a step (1-based) after a text: of the token that comes `step` after the next one.
DraftLogits = Callable[[Text, int], NDArray[np.float32]]


class KnownEngine(HostCacheEngine):
    """A base model with these `logits`, drafting `draft_logits`; its cache holds the tokens themselves.

    It takes up to `max_batch` requests a pass, and keeps the `batches` that it was given.
    """

    def __init__(self, dims: GraphDims, logits: Logits, draft_logits: DraftLogits, max_batch: int = 1) -> None:
        self.dims = dims
        self.max_batch = max_batch
        self.max_slots = 8
        self.batches: list[Batch] = []
        self.logits = logits
        self.draft_logits = draft_logits

    def run(self, batch: Batch) -> HostResult:
        assert 1 <= len(batch) <= self.max_batch
        self.batches.append(batch)
        laid_out = stack(batch.rows, batch.lengths, self.dims.join_order)
        drafts = sum(laid_out.sizes.pseudo_rows)
        found = HostResult(
            batch,
            np.zeros((len(batch), laid_out.logit_count, self.dims.vocab_size), dtype=np.float32),
            np.zeros((len(batch), drafts, self.dims.draft_width), dtype=np.float32),
            [laid_out.values[bindings.INPUT_IDS].astype(np.float32)[:, None, :, None]],
            [laid_out.values[bindings.INPUT_IDS].astype(np.float32)[:, None, :, None]],
            laid_out.pseudo,
        )
        for index, slot in enumerate(batch.slots):
            values = {name: value[index] for name, value in laid_out.values.items()}
            past = tuple(cache_of(slot).keys[0, 0, 0, : slot.length, 0].astype(int).tolist())
            ids, mask = values[bindings.INPUT_IDS], values[bindings.TREE_MASK]
            size = len(ids)
            texts = [(*past, *ids[mask[row, :size]].tolist()) for row in range(size)]
            for place, row in enumerate(values[bindings.LOGIT_ROWS][: len(batch.rows[index].logit_rows)]):
                assert values[bindings.POSITION_IDS][row] == len(texts[row]) - 1
                found.logits[index, place] = self.logits(texts[row])
            place = 0
            for step in self.dims.join_order:
                for parent in values[bindings.pseudo_parent(step + 1)]:
                    found.draft_logits[index, place] = self.draft_logits(texts[parent], step + 1)
                    place += 1
        found.logits.setflags(write=False)
        return found


def jobs_of(states: Sequence[DecodingState]) -> list[Job]:
    """Return a job for each state, of which nobody hears."""
    return [Job(state, MANY) for state in states]


def steps(
    engine: Engine, prompt: Sequence[int], drafter: Drafter, chunk: int = 8, **options: Any
) -> Iterator[list[int]]:
    """Yield the tokens that each step makes certain after `prompt`; `options` are those of `DecodingState`."""
    state = DecodingState(prompt, drafter, chunk, engine.dims.join_order, **options)
    count = 0
    for _ in run(engine, jobs_of([state]), Limits(prompt_chunk=chunk)):
        if certain := state.tokens[count:]:
            yield certain
        count = len(state.tokens)
