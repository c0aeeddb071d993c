"""Several requests in one scheduler: each has the tokens that it has alone, whatever runs beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import Generator
from runtime.bundle.engine_file import read_engine_file
from runtime.decode import DecodingState, Greedy
from runtime.drafting.drafter import Drafter
from runtime.drafting.sizing import FixedSizes
from runtime.drafting.text_drafts import TextDrafts
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.engines.host_cache import KeyValueCache
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.engines.onnxruntime_cpu import OnnxRuntimeCpuEngine
from runtime.engines.protocol import Engine, Slot
from runtime.errors import DeadlineError, EngineError, InputError
from runtime.rows import Phase
from runtime.sampling import Sampling
from runtime.sampling.choice import Choice
from runtime.sampling.sampler import Sampler
from runtime.scheduling.job import Job
from runtime.scheduling.scheduler import Limits, Scheduler, run
from runtime.scheduling.slots import MANY
from runtime.tree import Tree, TreeSizes
from tests.runtime.known_engine import KnownEngine, jobs_of
from tests.runtime.test_decode import DIMS, VOCAB, known_engine, plain, request_for

PLAIN = TreeSizes(1, (0, 0, 0))
trees_ = st.builds(TreeSizes, st.integers(1, 9), st.tuples(*[st.integers(0, 9)] * 3))
prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)
right_ = st.lists(st.booleans(), min_size=1, max_size=7)


def drafter_of(sizes: TreeSizes, ngrams: bool = False) -> Drafter:
    return Drafter(FixedSizes(sizes), [TransferDrafts(), *([TextDrafts()] if ngrams else [])])


class Told:
    """Keeps what it is told of a job."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.ended = False
        self.error: BaseException | None = None

    def stepped(self, job: Job) -> None:
        self.steps.append(len(job.state.tokens))
        self.ended |= job.state.ended

    def failed(self, job: Job, error: BaseException) -> None:
        assert not self.over, "a job ends once"
        self.error = error

    @property
    def over(self) -> bool:
        return self.ended or self.error is not None


def test_three_requests_interleaved_each_have_the_tokens_of_plain_decoding() -> None:
    engine = known_engine([True, False], max_batch=3)
    texts = [[1, 2, 3], [4] * 11, [5, 6]]
    sizes = [TreeSizes(4, (4, 2, 1)), PLAIN, TreeSizes(6, (6, 6, 6))]
    counts = [9, 5, 14]
    states = [
        request_for(drafter_of(one), text, max_new_tokens=count)
        for one, text, count in zip(sizes, texts, counts, strict=True)
    ]
    before = 0
    for _ in run(engine, jobs_of(states), Limits(prompt_chunk=8)):
        # A step is a pass of one prompt, and one of all that decode.
        phases = [batch.phase for batch in engine.batches[before:]]
        assert phases in ([Phase.PROMPT], [Phase.PROMPT, Phase.DECODE], [Phase.DECODE])
        before = len(engine.batches)
    for state, text, count in zip(states, texts, counts, strict=True):
        assert state.tokens == plain(text, count)
        assert state.ended
    assert max(len(batch) for batch in engine.batches) == 3
    # Once the shorter answers have ended, the longest goes on by itself.
    assert len(engine.batches[-1]) == 1


@given(
    st.lists(st.tuples(prompts, trees_, st.integers(1, 12), st.booleans()), min_size=1, max_size=5),
    right_,
    st.integers(1, 4),
    st.integers(1, 6),
    st.permutations(range(3)),
)
def test_any_requests_together_have_the_tokens_and_steps_that_each_has_alone(
    asked: list[tuple[list[int], TreeSizes, int, bool]],
    right: list[bool],
    max_batch: int,
    max_slots: int,
    layers: list[int],
) -> None:
    # Transfer layers in any order, so that padding is laid out in another order than the steps'.
    dims = replace(DIMS, num_layers=3, transfer_layers=tuple(layers))

    def jobs() -> list[Job]:
        return [
            Job(
                DecodingState(prompt, drafter_of(sizes, ngrams), 8, dims.join_order, max_new_tokens=count),
                MANY,
                listener=Told(),
            )
            for prompt, sizes, count, ngrams in asked
        ]

    def steps(engine: KnownEngine, jobs: list[Job]) -> list[list[int]]:
        """Run the jobs; return how many tokens each had after each of its steps."""
        for _ in run(engine, jobs, Limits(prompt_chunk=8)):
            pass
        return [told(job).steps for job in jobs]

    together = jobs()
    engine = known_engine(right, max_batch, dims)
    engine.max_slots = max_slots
    lengths = steps(engine, together)
    for job in together:
        assert job.state.tokens == plain(list(job.state.prompt), job.state.max_new_tokens)
    for found, job, alone in zip(lengths, together, jobs(), strict=True):
        assert steps(known_engine(right, dims=dims), [alone]) == [found]
        assert (job.state.tokens, job.state.committed) == (alone.state.tokens, alone.state.committed)


def told(job: Job) -> Told:
    assert isinstance(job.listener, Told)
    return job.listener


class OnceEach:
    """Chooses greedily, and sees that it is asked once for each token, in order."""

    def __init__(self) -> None:
        self.greedy = Greedy()
        self.wanted = self.greedy.wanted
        self.count = 0

    def __call__(self, found: Choice) -> int:
        self.count += 1
        return self.greedy(found)


class Toggled:
    """Sizes that switch between drafting nothing and a tree, by a pattern."""

    draft_steps = 3
    least = 0.0

    def __init__(self, sizes: TreeSizes, pattern: Sequence[bool]) -> None:
        self.sizes = sizes
        self.pattern = pattern
        self.step = 0
        self.most_rows = sizes.tree_rows

    def choose(self, tree: Tree, context: int, drafted: bool) -> TreeSizes:
        self.step += 1
        return self.sizes if self.pattern[self.step % len(self.pattern)] else PLAIN

    def learn(self, accepted: int) -> None:
        pass


@dataclass(frozen=True)
class Asked:
    """A request of a schedule: it comes before step `at`, and is cancelled before step `cancelled`, if at all."""

    prompt: list[int]
    sizes: TreeSizes
    count: int
    pattern: list[bool]
    ngrams: bool
    priority: int
    at: int
    cancelled: int | None


# Beginnings that several requests share.
SHARED = [[token % VOCAB for token in range(start, start + 40)] for start in (0, 5)]
asked_ = st.builds(
    Asked,
    st.one_of(
        prompts,
        st.builds(lambda shared, cut, rest: shared[:cut] + rest, st.sampled_from(SHARED), st.integers(10, 40), prompts),
    ),
    trees_,
    st.integers(1, 14),
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.booleans(),
    st.integers(-1, 1),
    st.integers(0, 25),
    st.none() | st.integers(0, 40),
)


@given(
    st.lists(asked_, min_size=1, max_size=9),
    right_,
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 200),
    st.sampled_from([0, 40, 400]),
    st.integers(1, 16),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_schedule_gives_each_request_the_text_it_has_alone(
    asked: list[Asked],
    right: list[bool],
    max_batch: int,
    max_slots: int,
    spare: int,
    prefix_rows: int,
    chunk: int,
    packs: bool,
) -> None:
    """Requests come and go between steps, in a pool that holds hardly more than the longest of them."""
    engine = known_engine(right, max_batch)
    engine.max_slots, engine.packs = max_slots, packs
    made: list[Job] = []
    for one in asked:
        state = DecodingState(
            one.prompt,
            Drafter(Toggled(one.sizes, one.pattern), [TransferDrafts(), *([TextDrafts()] if one.ngrams else [])]),
            8,
            DIMS.join_order,
            OnceEach(),
            one.count,
        )
        most = len(one.prompt) + one.count + one.sizes.tree_rows * 4
        made.append(Job(state, most, one.priority, listener=Told()))
    rows = max(-(-job.most_rows // 16) * 16 for job in made) + spare
    scheduler = Scheduler(
        engine, Limits(cache_rows=rows, prefix_rows=min(prefix_rows, rows), prompt_chunk=chunk), checked=True
    )
    step = 0
    while step <= max(one.at for one in asked) or not scheduler.idle:
        for one, job in zip(asked, made, strict=True):
            if one.at == step:
                scheduler.add(job)
            if one.cancelled == step and one.cancelled >= one.at:
                scheduler.cancel(job)
        scheduler.step()
        step += 1
        assert step < 5000, "every request comes to its end"
    for one, job in zip(asked, made, strict=True):
        expected = plain(one.prompt, one.count)
        tokens = job.state.tokens
        assert tokens == expected[: len(tokens)]
        assert isinstance(job.state.choose, OnceEach)
        assert job.state.choose.count == len(tokens), "nothing is chosen twice"
        assert told(job).error is None
        if one.cancelled is None or one.cancelled < one.at:
            assert tokens == expected
            assert told(job).ended
    assert scheduler.slots.pool.most_reserved <= rows
    assert len(scheduler.slots.pool) == len(scheduler.slots.prefixes)


def test_the_youngest_of_the_lowest_priority_makes_room_and_comes_back() -> None:
    engine = known_engine([True], max_batch=4)
    old, urgent, young = (
        Job(request_for(drafter_of(PLAIN), [1] * 30, max_new_tokens=30), 64, priority, listener=Told())
        for priority in (0, 1, 0)
    )
    scheduler = Scheduler(engine, Limits(cache_rows=160, prompt_chunk=64), checked=True)
    for job in (old, urgent, young):
        scheduler.add(job)
    while not scheduler.idle:
        scheduler.step()
    assert (old.preemptions, urgent.preemptions) == (0, 0)
    assert young.preemptions > 0
    assert scheduler.metrics.preemptions == young.preemptions
    for job in (old, urgent, young):
        assert job.state.tokens == plain([1] * 30, 30)


def test_of_higher_priority_first_and_among_equals_the_first_come() -> None:
    engine = known_engine([True])
    engine.max_slots = 1
    order: list[int] = []

    class Noted(Told):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def stepped(self, job: Job) -> None:
            super().stepped(job)
            if job.state.ended:
                order.append(self.number)

    scheduler = Scheduler(engine)
    for number, priority in enumerate((0, 0, 2, 1, 2)):
        state = request_for(drafter_of(PLAIN), [1], max_new_tokens=3)
        scheduler.add(Job(state, 16, priority, listener=Noted(number)))
    while not scheduler.idle:
        scheduler.step()
    assert order == [2, 4, 3, 0, 1]


def test_nobody_waits_for_ever_behind_those_of_higher_priority() -> None:
    engine = known_engine([True])
    engine.max_slots = 1
    scheduler = Scheduler(engine)
    # It came so long ago that its waiting counts for more than the priority of the others.
    patient = Job(request_for(drafter_of(PLAIN), [1], max_new_tokens=3), 16, 0, listener=Told())
    patient.submitted = time.monotonic() - 1000
    for _ in range(5):
        scheduler.add(Job(request_for(drafter_of(PLAIN), [1], max_new_tokens=3), 16, 5, listener=Told()))
    scheduler.add(patient)
    while not told(patient).ended:
        scheduler.step()
    assert len(scheduler.waiting) == 5


def test_a_prompt_that_began_alike_is_not_computed_again() -> None:
    engine = known_engine([True], max_batch=4)
    scheduler = Scheduler(engine, Limits(cache_rows=4096, prefix_rows=1024, prompt_chunk=8), checked=True)
    system = [token % VOCAB for token in range(100)]
    first, second, other = (
        Job(request_for(drafter_of(TreeSizes(4, (4, 4, 4))), prompt, max_new_tokens=5), 256, listener=Told())
        for prompt in ([*system, 1, 2], [*system, 3, 4, 5], [7] * 30)
    )
    for job in (first, second, other):
        engine.batches.clear()
        scheduler.add(job)
        while not scheduler.idle:
            scheduler.step()
        run_ = sum(
            len(rows.input_ids) for batch in engine.batches for rows in batch.rows if batch.phase is Phase.PROMPT
        )
        assert run_ == len(job.state.prompt) - job.cached
        assert job.state.tokens == plain(list(job.state.prompt), 5)
    assert (first.cached, second.cached, other.cached) == (0, 100, 0)
    # The same again: all but the last token of the prompt.
    again = Job(request_for(drafter_of(PLAIN), [*system, 1, 2], max_new_tokens=5), 256, listener=Told())
    scheduler.add(again)
    while not scheduler.idle:
        scheduler.step()
    assert again.cached == 101
    assert again.state.tokens == first.state.tokens


def test_requests_that_wait_for_the_same_beginning_have_it_computed_once() -> None:
    engine = known_engine([True], max_batch=8)
    scheduler = Scheduler(engine, Limits(cache_rows=4096, prefix_rows=1024, prompt_chunk=16), checked=True)
    system = [token % VOCAB for token in range(100)]
    jobs = [
        Job(request_for(drafter_of(PLAIN), [*system, number], max_new_tokens=4), 256, listener=Told())
        for number in range(6)
    ]
    for job in jobs:
        scheduler.add(job)
    while not scheduler.idle:
        scheduler.step()
    for job in jobs:
        assert job.state.tokens == plain(list(job.state.prompt), 4)
    assert jobs[0].cached == 0
    assert all(job.cached >= 96 for job in jobs[1:])
    # They decoded together.
    assert scheduler.metrics.most_running == 6


def test_kept_rows_make_way_the_least_recently_used_first() -> None:
    engine = known_engine([True])
    scheduler = Scheduler(engine, Limits(cache_rows=256, prefix_rows=128, prompt_chunk=64), checked=True)

    def ask(token: int) -> Job:
        job = Job(request_for(drafter_of(PLAIN), [token] * 50, max_new_tokens=2), 64, listener=Told())
        scheduler.add(job)
        while not scheduler.idle:
            scheduler.step()
        return job

    assert [ask(token).cached for token in (1, 2)] == [0, 0]
    assert ask(1).cached == 49
    # There is room for two: the one used last stays.
    assert ask(3).cached == 0
    assert ask(1).cached == 49
    assert ask(2).cached == 0


def test_rows_that_there_is_no_memory_to_keep_are_computed_again() -> None:
    class Full(KnownEngine):
        def keep(self, slot: Slot, rows: int) -> KeyValueCache:
            raise InputError("the GPU has too little memory")

    known = known_engine([True])
    scheduler = Scheduler(
        Full(known.dims, known.logits, known.draft_logits), Limits(cache_rows=256, prefix_rows=128), checked=True
    )
    for _ in range(2):
        job = Job(request_for(drafter_of(PLAIN), [1] * 50, max_new_tokens=2), 64, listener=Told())
        scheduler.add(job)
        while not scheduler.idle:
            scheduler.step()
        assert job.state.tokens == plain([1] * 50, 2)
        assert job.cached == 0


class Refusing(KnownEngine):
    """Refuses a pass over 20 rows of one request, as an engine does what does not fit."""

    def run(self, batch):  # type: ignore[no-untyped-def]
        if max(batch.lengths) >= 20:
            self.batches.append(batch)
            raise InputError("20 rows are too many")
        return super().run(batch)


@pytest.mark.parametrize("sizes", [PLAIN, TreeSizes(4, (4, 2, 1))])
def test_a_request_that_does_not_fit_the_engine_fails_alone(sizes: TreeSizes) -> None:
    known = known_engine([True, False])
    engine = Refusing(known.dims, known.logits, known.draft_logits, 4)
    scheduler = Scheduler(engine, Limits(cache_rows=2048, prefix_rows=512), checked=True)
    texts = [[1, 2], [3] * 12, [4], [5] * 11]
    jobs = [Job(request_for(drafter_of(sizes), text, max_new_tokens=17), 64, listener=Told()) for text in texts]
    for job in jobs:
        scheduler.add(job)
    while not scheduler.idle:
        scheduler.step()
    for text, job in zip(texts, jobs, strict=True):
        expected = plain(text, 17)
        if len(text) < 3:
            assert (told(job).error, job.state.tokens) == (None, expected)
            continue
        assert str(told(job).error) == "20 rows are too many"
        # It has all that was certain before.
        assert 8 <= len(job.state.tokens) < 17
        assert job.state.tokens == expected[: len(job.state.tokens)]
    assert scheduler.failure is None
    # The others were together with them, and are together still.
    assert {4, 2} <= {len(batch) for batch in engine.batches}


class Breaking(KnownEngine):
    """Fails in the pass after `passes`."""

    passes = 3

    def run(self, batch):  # type: ignore[no-untyped-def]
        if not self.passes:
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY\nat line 7")
        self.passes -= 1
        return super().run(batch)


def test_when_the_engine_fails_every_request_is_told_and_no_more_are_taken() -> None:
    known = known_engine([True], max_batch=2)
    engine = Breaking(known.dims, known.logits, known.draft_logits, 2)
    scheduler = Scheduler(engine, Limits(cache_rows=1024, prefix_rows=512), checked=True)
    jobs = [Job(request_for(drafter_of(PLAIN), [1] * 20, max_new_tokens=9), 64, listener=Told()) for _ in range(4)]
    for job in jobs:
        scheduler.add(job)
    while not scheduler.idle:
        scheduler.step()
    for job in jobs:
        assert isinstance(told(job).error, EngineError)
        assert str(told(job).error) == "the engine failed (RuntimeError: CUDA_ERROR_OUT_OF_MEMORY); load it anew"
    with pytest.raises(EngineError, match="CUDA_ERROR"):
        scheduler.add(Job(request_for(drafter_of(PLAIN), [1]), 64))
    assert not scheduler.slots.pool.reserved


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), StopIteration(), KeyboardInterrupt()])
def test_a_request_that_fails_fails_alone(error: BaseException) -> None:
    engine = known_engine([True], max_batch=3)

    class Failing(OnceEach):
        def __call__(self, found: Choice) -> int:
            if self.count == 3:
                raise error
            return super().__call__(found)

    good = [Job(request_for(drafter_of(PLAIN), [1, 2], max_new_tokens=9), 64, listener=Told()) for _ in range(2)]
    bad = Job(request_for(drafter_of(PLAIN), [1, 2], max_new_tokens=9, choose=Failing()), 64, listener=Told())
    scheduler = Scheduler(engine, checked=True)
    for job in (good[0], bad, good[1]):
        scheduler.add(job)
    while not scheduler.idle:
        scheduler.step()
    for job in good:
        assert job.state.tokens == plain([1, 2], 9)
    found = told(bad).error
    assert found is error or (isinstance(error, StopIteration) and isinstance(found, RuntimeError))


def test_a_listener_that_raises_ends_its_job_alone() -> None:
    class Raising(Told):
        def stepped(self, job: Job) -> None:
            if len(job.state.tokens) == 3:
                raise ValueError("gone")
            super().stepped(job)

    scheduler = Scheduler(known_engine([True], max_batch=2), checked=True)
    jobs = [
        Job(request_for(drafter_of(PLAIN), [1], max_new_tokens=6), 64, listener=listener)
        for listener in (Raising(), Told())
    ]
    for job in jobs:
        scheduler.add(job)
    while not scheduler.idle:
        scheduler.step()
    assert str(told(jobs[0]).error) == "gone"
    assert jobs[1].state.tokens == plain([1], 6)


def test_a_deadline_that_passes_while_a_request_waits_is_an_error_and_later_the_end_of_its_text() -> None:
    engine = known_engine([True])
    engine.max_slots = 1
    scheduler = Scheduler(engine, checked=True)
    now = time.monotonic()
    running = Job(request_for(drafter_of(PLAIN), [1], max_new_tokens=50), 64, 0, now + 1000, Told())
    waiting = Job(request_for(drafter_of(PLAIN), [1], max_new_tokens=50), 64, 0, now - 1, Told())
    scheduler.add(running)
    scheduler.step()
    scheduler.add(waiting)
    scheduler.step()
    assert isinstance(told(waiting).error, DeadlineError)
    assert not told(running).over
    running.deadline = now
    scheduler.step()
    assert told(running).ended
    assert running.state.tokens == plain([1], len(running.state.tokens))
    assert scheduler.idle


def test_a_long_prompt_does_not_hold_up_those_that_decode() -> None:
    engine = known_engine([True], max_batch=2)
    scheduler = Scheduler(engine, Limits(prompt_chunk=4096, max_stall_s=1e-9))
    short = Job(request_for(drafter_of(PLAIN), [1], max_new_tokens=100), MANY, listener=Told())
    scheduler.add(short)
    scheduler.step()
    scheduler.add(Job(request_for(drafter_of(PLAIN), [2] * 1000, max_new_tokens=2), MANY, listener=Told()))
    for _ in range(20):
        before = len(short.state.tokens)
        scheduler.step()
        assert len(short.state.tokens) == before + 1
    parts = [len(batch.rows[0].input_ids) for batch in engine.batches if batch.phase is Phase.PROMPT]
    # Nothing was measured when the first one was planned.
    assert max(parts[2:]) == 16


def test_no_requests_are_no_steps() -> None:
    assert list(run(known_engine([True]), [])) == []


@pytest.fixture(scope="module", params=[OnnxRuntimeEngine, OnnxRuntimeCpuEngine])
def engine(request: pytest.FixtureRequest, tiny_engine: Path) -> Engine:
    graph = "engine.onnx" if request.param is OnnxRuntimeEngine else "engine.cpu.onnx"
    found: Engine = request.param(tiny_engine.with_name(graph), read_engine_file(tiny_engine).dims, threads=1)
    return found


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("limits", [Limits(), Limits(cache_rows=192, prefix_rows=64, max_batch=3)])
def test_a_real_graph_gives_each_request_the_tokens_it_has_alone(
    tiny_engine: Path, engine: Engine, sampled: bool, limits: Limits
) -> None:
    generator = Generator(tiny_engine, threads=1, adapt=False, prefix_cache_bytes=0)
    about, dims = generator.about, generator.about.dims
    texts = ["Hello", "x" * 40, "The sky is blue, the sky is", "a"]
    sizes = [TreeSizes(6, (6, 4, 2)), PLAIN, TreeSizes(3, (1, 0, 0)), TreeSizes(9, (9, 9, 9))]
    options = [Sampling(temperature=0.9, top_p=0.9, seed=seed) if sampled else Sampling() for seed in range(4)]
    jobs = []
    for text, one, sampling in zip(texts, sizes, options, strict=True):
        ids = generator.encode(text)
        sampler = Sampler(sampling, ids, dims.vocab_size, about.stop_tokens)
        drafter = generator.new_drafter(FixedSizes(one), sampling.temperature, sampler.noise)
        stops = about.stop_tokens.__contains__
        state = DecodingState(ids, drafter, about.prompt_chunk, dims.join_order, sampler, 30, stops)
        jobs.append(Job(state, 160))
    batches = 0
    for _ in run(engine, jobs, limits):
        batches += 1
    assert batches < sum(len(job.state.tokens) for job in jobs)
    for text, job, sampling in zip(texts, jobs, options, strict=True):
        alone = generator.generate(text, max_new_tokens=30, speculate=False, sampling=sampling)
        assert job.state.tokens == alone.tokens


def test_lists_of_logits_are_not_kept() -> None:
    """A job that has ended holds no outputs of its last pass."""
    engine = known_engine([True])
    job = Job(request_for(drafter_of(PLAIN), [1], max_new_tokens=3), 16)
    for _ in run(engine, [job]):
        pass
    assert job.rows is None
