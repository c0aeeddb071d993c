"""Continuous batching: requests join and leave between steps, and run together in as few passes as they can.

A step is one pass for a part of the prompts that are under way, small enough that nobody waits for long, and one pass
for all requests that decode, or several where an engine takes fewer of them at once. The scheduler is used by one
thread and knows of no other.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from runtime.drafting.sizing import BatchMenu
from runtime.engines.protocol import Batch, Engine, Kept, Slot
from runtime.errors import DeadlineError, EngineError, InputError, ServiceError, one_line
from runtime.rows import Rows
from runtime.scheduling.job import Job
from runtime.scheduling.metrics import Metrics
from runtime.scheduling.pace import Pace
from runtime.scheduling.pool import CachePool, Footprint, in_blocks
from runtime.scheduling.prefixes import SHORTEST, Prefix, Prefixes, common
from runtime.scheduling.shared_sizes import SharedSizes

# Seconds of waiting that are worth as much as one step of priority: so that nobody waits for ever.
AGING_SECONDS = 30.0
# Rows that must be free beside a prompt's before it begins, or it would soon have to leave again.
MARGIN = 32
# Rows without limit.
MANY = 1 << 40


@dataclass(frozen=True)
class Limits:
    """What a scheduler may use: `max_batch` requests that run at once, `cache_rows` rows of cache, of them up to
    `prefix_rows` for prompts that may come again; chunks of prompts of up to `prompt_chunk` tokens, of fewer where
    running requests would wait for more than `max_stall_s` seconds. `footprint` tells what slots take that all have the
    same room.
    """

    max_batch: int = 1 << 20
    cache_rows: int = MANY
    prefix_rows: int = 0
    prompt_chunk: int = 128
    max_stall_s: float = 0.2
    footprint: Footprint | None = None


@dataclass
class Scheduler:
    """Runs jobs on `engine` within `limits`. With `checked` every step ends with a check of all that is accounted.

    `batch_menus` have the time of passes of several requests: by them the sizes of trees are chosen for all together.
    Without them each request chooses as if it were alone.
    """

    engine: Engine
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    checked: bool = False
    batch_menus: Sequence[BatchMenu] = ()

    def __post_init__(self) -> None:
        self._shared = SharedSizes(self.batch_menus)
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.pool = CachePool(self.limits.cache_rows, self.limits.footprint)
        self.prefixes = Prefixes()
        self._kept_rows = 0
        self._pace = Pace(self.limits.max_stall_s)
        self._most_running = min(self.limits.max_batch, self.engine.max_slots)
        self.failure: EngineError | None = None

    @property
    def idle(self) -> bool:
        """Return whether there is nothing to do."""
        return not (self.waiting or self.running)

    def add(self, job: Job) -> None:
        """Take `job`. Raises `EngineError` where the engine has failed."""
        if self.failure is not None:
            raise self.failure
        self.waiting.append(job)

    def cancel(self, job: Job) -> None:
        """Drop `job`; its listener is told nothing. One that has ended already stays as it is."""
        if job in self.waiting:
            self.waiting.remove(job)
            self.metrics.cancelled += 1
        elif job in self.running:
            self._retire(job)
            self.metrics.cancelled += 1

    def step(self) -> None:
        """Run one step of all that can run."""
        if self.failure is not None:
            return
        start = time.monotonic()
        self._expire(start)
        self._admit(start)
        decoding = [job for job in self.running if job.decodes]
        try:
            self._run_prompts(beside=bool(decoding))
            begun = time.perf_counter()
            for group in self._groups(decoding):
                self._shared.prepare(group)
                self._pass([(job, self._limit) for job in group])
            if decoding:
                self._pace.decoded(time.perf_counter() - begun)
        except _EngineFailedError as error:
            self._fail_all(error)
            return
        if self.checked or self.idle:
            self.check()

    def check(self) -> None:
        """Raise `AssertionError` unless the pool accounts for every slot in use, and for no other."""
        running = [job.slot for job in self.running if job.slot is not None]
        self.pool.check([*running, *(kept.rows for kept in self.prefixes)])
        assert self._kept_rows == sum(kept.rows.length for kept in self.prefixes), "the rows of kept prefixes"

    def fail(self, error: EngineError) -> None:
        """End all jobs by `error`, and take no more."""
        self.failure = error
        self.close(error)

    def close(self, error: ServiceError) -> None:
        """End all jobs by `error`, and drop all that is kept."""
        for job in [*self.running, *self.waiting]:
            self._fail(job, error)
        self._forget(MANY)

    @property
    def _limit(self) -> int:
        return self.limits.prompt_chunk

    # Who runs.

    def _expire(self, now: float) -> None:
        for job in [job for job in self.waiting if job.deadline is not None and job.deadline <= now]:
            self.waiting.remove(job)
            if job.state.tokens:
                # It ran, and had to leave its slot: what it has so far is its answer.
                self._end_early(job)
            else:
                self.metrics.failed += 1
                job.listener.failed(job, DeadlineError("the deadline passed while the request waited for its turn"))
        for job in [job for job in self.running if job.deadline is not None and job.deadline <= now]:
            self._retire(job)
            self._end_early(job)

    def _end_early(self, job: Job) -> None:
        job.state.ended = True
        self._tell(job)

    def _admit(self, now: float) -> None:
        self.waiting.sort(key=lambda job: (-self._urgency(job, now), job.arrival))
        for job in list(self.waiting):
            if len(self.running) >= self._most_running:
                break
            # Whatever is of use to it is the last to make way.
            there = self._longest_prefix(job.state.prompt[:-1])[1]
            if self._waits_for_prefix(job, there):
                continue
            needed = max(len(job.state.prompt), job.state.committed) + MARGIN
            if not self._has_room(min(needed, job.most_rows)):
                break
            self._start(job)
            self.waiting.remove(job)

    @staticmethod
    def _urgency(job: Job, now: float) -> float:
        return job.priority + (now - job.submitted) / AGING_SECONDS

    def _start(self, job: Job) -> None:
        slot = self.engine.new_slot()
        self.pool.admit(slot)
        tokens = job.tokens
        # The last token's pass makes the first drafts: a prompt is never all there.
        most = job.state.committed or len(tokens) - 1
        source, length = self._longest_prefix(tokens[:most])
        if source is not None and self.pool.reserve(slot, length):
            self.engine.copy(source, slot, length)
        first = not job.started
        job.begin(slot)
        if first:
            self.metrics.started(job)
        self.running.append(job)
        self.metrics.most_running = max(self.metrics.most_running, len(self.running))

    def _longest_prefix(self, tokens: Sequence[int]) -> tuple[Slot | Kept | None, int]:
        """Return the rows that share the longest beginning with `tokens`, kept or in use, and its length."""
        if not self.limits.prefix_rows:
            return None, 0
        kept, length = self.prefixes.longest(tokens)
        found: Slot | Kept | None = kept.rows if kept else None
        if kept:
            self.prefixes.use(kept)
        for job in self.running:
            assert job.slot is not None
            if job.slot.length > length:
                shared = min(common(job.tokens, tokens), job.slot.length)
                if shared >= SHORTEST and shared > length:
                    found, length = job.slot, shared
        return found, length

    def _waits_for_prefix(self, job: Job, there: int) -> bool:
        """Return whether a running request is about to compute a longer beginning of the job's prompt than the tokens
        that are `there`.
        """
        if not self.limits.prefix_rows:
            return False
        prompt = job.state.prompt
        for one in self.running:
            assert one.slot is not None
            if not one.decodes:
                shared = min(common(one.state.prompt, prompt), len(prompt) - 1)
                if shared - max(there, one.slot.length) >= SHORTEST:
                    return True
        return False

    def _groups(self, decoding: list[Job]) -> Iterator[list[Job]]:
        most = self.engine.max_batch
        if len(decoding) > most and not self.engine.packs:
            # In a pass that is padded all pay for the longest.
            decoding = sorted(decoding, key=lambda job: job.slot.length if job.slot else 0)
        for start in range(0, len(decoding), most):
            # Those before may have made one of them leave.
            if group := [job for job in decoding[start : start + most] if job.slot is not None]:
                yield group

    # What runs.

    def _run_prompts(self, *, beside: bool) -> None:
        """Run one pass of prompts that are under way, the oldest first, `beside` others that decode."""
        left = self._pace.prompt_rows(self._limit) if beside else self._limit
        group: list[tuple[Job, int]] = []
        for job in sorted((job for job in self.running if not job.decodes), key=lambda job: job.arrival):
            if left < 1 or len(group) == self.engine.max_batch or (group and not self.engine.packs):
                break
            chunk = min(left, self._limit)
            group.append((job, chunk))
            left -= min(chunk, job.rows_to_prompt_end)
        if group:
            begun = time.perf_counter()
            rows = self._pass(group)
            self._pace.prompted(rows, time.perf_counter() - begun)

    def _pass(self, group: Iterable[tuple[Job, int]]) -> int:
        """Run one pass of the jobs of `group`, each with the chunk of its prompt; return how many tree rows it had."""
        jobs: list[Job] = []
        for job, chunk in group:
            with self._alone(job):
                job.prepare(chunk)
                jobs.append(job)
        sizes = self._shared.choose(jobs)
        wanted: list[tuple[Job, Rows]] = []
        for job in jobs:
            with self._alone(job):
                wanted.append((job, job.lay_out(sizes.get(job))))
        # Where requests are brought to one size, each is written as many rows as the largest.
        most = max((len(rows.position_ids) for _, rows in wanted), default=0)
        reserved = [
            (job, rows)
            for job, rows in wanted
            if job.slot is not None and self._reserve(job, len(rows.position_ids) if self.engine.packs else most)
        ]
        # Making room for one may have taken another out of its slot.
        ready = [(job, rows, job.slot) for job, rows in reserved if job.slot is not None]
        if not ready:
            return 0
        batch = Batch.of([rows for _, rows, _ in ready], [slot for _, _, slot in ready])
        try:
            result = self.engine.run(batch)
        except InputError as error:
            # The pass does not fit the engine, which itself goes on.
            if len(ready) == 1:
                self._fail(ready[0][0], error)
                return 0
            # Each keeps the rows that it wants: by itself it runs, or is the one that does not fit.
            return sum(self._pass([(job, self._limit)]) for job, _, _ in ready if job.slot is not None)
        except Exception as error:
            raise _EngineFailedError from error
        accepted: list[Sequence[int]] = []
        failures: list[tuple[Job, BaseException]] = []
        grown: list[tuple[Job, int]] = []
        for index, (job, rows, _) in enumerate(ready):
            before = len(job.state.tokens)
            try:
                accepted.append(job.accept(rows, result.outputs(index)))
            except BaseException as error:
                # It ends when the others' rows are committed.
                accepted.append(())
                failures.append((job, error))
                continue
            if len(job.state.tokens) > before:
                grown.append((job, before))
        try:
            self.engine.commit(result, accepted)
        except Exception as error:
            raise _EngineFailedError from error
        self.metrics.passed(batch, accepted)
        self._shared.learn([len(job.state.tokens) - before for job, before in grown])
        for job, failure in failures:
            self._fail(job, failure)
        for job, before in grown:
            if not before:
                self.metrics.first_token_seconds.add(time.monotonic() - job.submitted)
            if job.state.ended:
                self._retire(job)
            self._tell(job)
        return sum(len(rows.input_ids) for _, rows, _ in ready)

    def _tell(self, job: Job) -> None:
        with self._alone(job):
            job.listener.stepped(job)
            if job.state.ended:
                self.metrics.finished(job)

    # Memory.

    def _reserve(self, job: Job, rows: int) -> bool:
        """Have room for `rows` more rows of `job`, whoever must leave; return False where that is the job itself."""
        assert job.slot is not None
        while not self.pool.reserve(job.slot, job.slot.length + rows):
            if self._forget(1):
                continue
            victim = max(self.running, key=lambda one: (-one.priority, one.arrival))
            self._preempt(victim)
            if victim is job:
                return False
        return True

    def _has_room(self, rows: int) -> bool:
        """Return whether there is room for one more slot of `rows` rows, once kept prefixes have made way."""
        while not self.pool.has_room(rows):
            if not self._forget(1):
                return False
        return True

    def _forget(self, rows: int) -> bool:
        """Free kept prefixes of `rows` rows or more, or all; return whether there were any."""
        freed = False
        target = self.pool.free + rows
        while self.pool.free < target and (kept := self.prefixes.oldest()) is not None:
            self._drop(kept)
            freed = True
        return freed

    def _drop(self, kept: Prefix) -> None:
        self._kept_rows -= kept.rows.length
        self.pool.close(kept.rows)

    def _preempt(self, job: Job) -> None:
        """Take `job` out of its slot: it waits in front of those that came after it, and computes its rows again."""
        self.running.remove(job)
        self._release(job.leave())
        job.preemptions += 1
        self.metrics.preemptions += 1
        self.waiting.append(job)

    def _retire(self, job: Job) -> None:
        """Take `job`, which is over, out of its slot; keep its rows for others where that is asked for."""
        self.running.remove(job)
        slot = job.leave()
        tokens = tuple(job.tokens[: slot.length])
        if SHORTEST <= len(tokens) <= self.limits.prefix_rows:
            self._keep(tokens, slot)
        self._release(slot)

    def _keep(self, tokens: tuple[int, ...], slot: Slot) -> None:
        """Keep the rows of `tokens`, which `slot` has, where there is memory for both."""
        for kept in self.prefixes.covered_by(tokens):
            self._drop(kept)
        rows = len(tokens)
        while self._kept_rows + rows > self.limits.prefix_rows or self.pool.free < in_blocks(rows):
            if not self._forget(1):
                return
        try:
            copies = self.engine.keep(slot, rows)
        except (InputError, MemoryError):
            # There is less memory than was thought: what would have been of use is computed again.
            return
        self.pool.admit(copies, kept=True)
        self.pool.reserve(copies, rows)
        self.prefixes.add(Prefix(tokens, copies))
        self._kept_rows += rows

    def _release(self, slot: Slot) -> None:
        self.pool.close(slot)
        self.engine.release(slot)

    # What goes wrong.

    @contextlib.contextmanager
    def _alone(self, job: Job) -> Iterator[None]:
        """End `job` alone by whatever is raised in the block: a part of it is the user's own."""
        try:
            yield
        except BaseException as error:
            self._fail(job, error)

    def _fail(self, job: Job, error: BaseException) -> None:
        """End `job` by `error`: its alone."""
        if job in self.running:
            self.running.remove(job)
            self._release(job.leave())
        elif job in self.waiting:
            self.waiting.remove(job)
        self.metrics.failed += 1
        job.listener.failed(job, error)

    def _fail_all(self, failed: _EngineFailedError) -> None:
        cause = failed.__cause__
        if not isinstance(cause, EngineError):
            failure = EngineError(f"the engine failed ({type(cause).__name__}: {one_line(cause)}); load it anew")
            failure.__cause__ = cause
            cause = failure
        self.fail(cause)


class _EngineFailedError(Exception):
    """The engine raised its cause: nothing that it holds can be relied on."""


def run(engine: Engine, states: Sequence[Job], limits: Limits | None = None) -> Iterator[None]:
    """Run jobs to their end on an engine that nothing else uses; yield after each step. Errors are raised."""
    scheduler = Scheduler(engine, limits or Limits())
    for job in states:
        scheduler.add(job)
    while not scheduler.idle:
        scheduler.step()
        yield
