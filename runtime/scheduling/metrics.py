"""Counts and distributions of what a scheduler has done, as plain data."""

from __future__ import annotations

import bisect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.rows import Phase

if TYPE_CHECKING:
    from runtime.engines.protocol import Batch
    from runtime.scheduling.job import Job

# Upper bounds of the seconds that are counted together.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
# And those of requests in a pass.
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    """Counts values by upper bounds; the last count is of those beyond all."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count `value` so many times."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain data."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum, "count": sum(self.counts)}


@dataclass
class Metrics:
    """What has happened since the beginning. See `to_dict`."""

    started_requests: int = 0
    finished_requests: int = 0
    failed: int = 0
    cancelled: int = 0
    preemptions: int = 0
    most_running: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    # Of requests that have finished; and of all.
    new_tokens: int = 0
    chosen_tokens: int = 0
    prompt_passes: int = 0
    decode_passes: int = 0
    # Passes in which more than one request verified candidates.
    tree_passes: int = 0
    verified_rows: int = 0
    accepted_rows: int = 0
    # Requests in passes that verified candidates for them, those candidates, and how often the first, the second, and
    # so on of a path was accepted.
    drafts: int = 0
    candidates: int = 0
    accepted_at: list[int] = field(default_factory=list)
    queue_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    token_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    request_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    batch_sizes: Histogram = field(default_factory=lambda: Histogram(SIZES))

    def started(self, job: Job) -> None:
        """Count a request that runs for the first time."""
        self.started_requests += 1
        self.queue_seconds.add(time.monotonic() - job.submitted)
        self.prompt_tokens += len(job.state.prompt)
        self.cached_prompt_tokens += job.cached

    def passed(self, batch: Batch, accepted: Sequence[Sequence[int]]) -> None:
        """Count a pass."""
        self.batch_sizes.add(len(batch))
        if batch.phase is Phase.PROMPT:
            self.prompt_passes += 1
            return
        self.decode_passes += 1
        rows = [len(one.input_ids) for one in batch.rows]
        self.verified_rows += sum(rows)
        trees = sum(count > 1 for count in rows)
        self.tree_passes += trees > 1
        self.drafts += trees
        self.candidates += sum(rows) - len(rows)
        self.accepted_rows += sum(map(len, accepted))

        for path in accepted:
            for place in range(len(path) - 1):
                if place == len(self.accepted_at):
                    self.accepted_at.append(0)
                self.accepted_at[place] += 1

    def grew(self, job: Job, before: int) -> None:
        """Count the tokens of a request that had `before` of them. Those of one step share its time."""
        count = len(job.state.tokens) - before
        if not count:
            return
        now = time.monotonic()
        self.chosen_tokens += count
        if before:
            self.token_seconds.add((now - job.latest) / count, count)
        else:
            self.first_token_seconds.add(now - job.submitted)
        job.latest = now

    def finished(self, job: Job) -> None:
        """Count a request that has its whole answer."""
        self.finished_requests += 1
        self.new_tokens += len(job.state.tokens)
        self.request_seconds.add(time.monotonic() - job.submitted)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data: numbers, lists of them, and for each distribution its bounds, counts
        and sum.
        """
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Histogram):
        return value.to_dict()
    return list(value) if isinstance(value, list) else value
