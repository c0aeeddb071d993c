"""Continuous batching: requests join and leave between steps, and run together in as few passes as they can.

A step is one pass for a part of the prompts that are under way, small enough that nobody waits for long, and one pass
for all requests that decode, or several where an engine takes fewer of them at once. The scheduler is used by one
thread and knows of no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from runtime.drafting.sizing import BatchMenu
from runtime.engines.protocol import Batch, Engine
from runtime.errors import DeadlineError, EngineError, InputError, ServiceError, one_line
from runtime.rows import Rows
from runtime.scheduling.job import Job
from runtime.scheduling.metrics import Metrics
from runtime.scheduling.pace import Pace
from runtime.scheduling.pass_sizes import PassSizes
from runtime.scheduling.pool import Footprint
from runtime.scheduling.row_budget import RowBudget
from runtime.scheduling.shared_sizes import SharedSizes
from runtime.scheduling.slots import MANY, Slots

# Seconds of waiting that are worth as much as one step of priority: so that nobody waits for ever.
AGING_SECONDS = 30.0
# Rows that must be free beside a prompt's before it begins, or it would soon have to leave again.
MARGIN = 32


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
        # What packs rows takes them one by one; the others bring all requests to one size.
        self._sizes: PassSizes = (RowBudget if self.engine.packs else SharedSizes)(self.batch_menus)
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.slots = Slots(self.engine, self.limits.cache_rows, self.limits.prefix_rows, self.limits.footprint)
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
                self._sizes.prepare(group)
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
        self.slots.check(self.running)

    def fail(self, error: EngineError) -> None:
        """End all jobs by `error`, and take no more."""
        self.failure = error
        self.close(error)

    def close(self, error: ServiceError) -> None:
        """End all jobs by `error`, and drop all that is kept."""
        for job in [*self.running, *self.waiting]:
            self._fail(job, error)
        self.slots.forget()

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
            prompt = job.state.prompt if job.reuses else ()
            there = self.slots.longest_prefix(prompt[:-1], self.running)[1]
            if self.slots.comes_soon(prompt, there, self.running):
                continue
            needed = max(len(job.state.prompt), job.state.committed) + MARGIN
            if not self.slots.has_room(min(needed, job.most_rows)):
                break
            self._start(job)
            self.waiting.remove(job)

    @staticmethod
    def _urgency(job: Job, now: float) -> float:
        return job.priority + (now - job.submitted) / AGING_SECONDS

    def _start(self, job: Job) -> None:
        tokens = job.tokens
        # The last token's pass makes the first drafts: a prompt is never all there.
        most = job.state.committed or len(tokens) - 1 if job.reuses else 0
        slot = self.slots.begin(tokens[:most], self.running)
        first = not job.started
        job.begin(slot)
        if first:
            self.metrics.started(job)
        self.running.append(job)
        self.metrics.most_running = max(self.metrics.most_running, len(self.running))

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
        begun = time.perf_counter()
        jobs: list[Job] = []
        for job, chunk in group:
            with self._alone(job):
                job.prepare(chunk)
                jobs.append(job)
        sizes = self._sizes.choose(jobs)
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
        # Those with new tokens, or at their end, and how many tokens they had.
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
            if len(job.state.tokens) > before or job.state.ended:
                grown.append((job, before))
        try:
            self.engine.commit(result, accepted)
        except Exception as error:
            raise _EngineFailedError from error
        self.metrics.passed(batch, accepted)
        self._sizes.learn([new for job, before in grown if (new := len(job.state.tokens) - before)])
        self._sizes.took(batch, time.perf_counter() - begun)
        for job, failure in failures:
            self._fail(job, failure)
        for job, before in grown:
            self.metrics.grew(job, before)
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
        while not self.slots.reserve(job.slot, rows):
            victim = max(self.running, key=lambda one: (-one.priority, one.arrival))
            self._preempt(victim)
            if victim is job:
                return False
        return True

    def _preempt(self, job: Job) -> None:
        """Take `job` out of its slot: it waits in front of those that came after it, and computes its rows again."""
        self.running.remove(job)
        self.slots.release(job.leave())
        job.preemptions += 1
        self.metrics.preemptions += 1
        self.waiting.append(job)

    def _retire(self, job: Job) -> None:
        """Take `job`, which is over, out of its slot."""
        self.running.remove(job)
        slot = job.leave()
        self.slots.retire(slot, job.tokens[: slot.length])

    # What goes wrong.

    def _alone(self, job: Job) -> _Alone:
        """End `job` alone by whatever is raised in the block: a part of it is the user's own."""
        return _Alone(self._fail, job)

    def _fail(self, job: Job, error: BaseException) -> None:
        """End `job` by `error`: its alone."""
        if job in self.running:
            self.running.remove(job)
            self.slots.release(job.leave())
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


class _Alone:
    """Hands what is raised in its block to `fail`, with the `job` that it is of. There is one for each part of each
    step of each request: a class takes a third of the time of a generator.
    """

    __slots__ = ("_fail", "_job")

    def __init__(self, fail: Callable[[Job, BaseException], None], job: Job) -> None:
        self._fail = fail
        self._job = job

    def __enter__(self) -> None:
        """Nothing is needed beforehand."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Hand the error over; it ends here."""
        if error is not None:
            self._fail(self._job, error)
        return True


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
