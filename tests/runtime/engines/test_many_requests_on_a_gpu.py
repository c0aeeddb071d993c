"""Many requests at once on a simulated GPU: whatever joins, leaves, grows and moves, each has what it has alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import EngineError, EngineFileError, Generator, InputError, Sampling, Tokens, TreeSizes
from runtime.decode import DecodingState
from runtime.drafting.sizing import FixedSizes
from runtime.engines import capturing_engine
from runtime.engines.device_engine import DeviceEngine
from runtime.engines.places import PlacedSlot
from runtime.engines.protocol import Batch
from runtime.engines.tensorrt import TensorRTEngine
from runtime.rows import lay_out, prompt_rows
from runtime.sampling.sampler import Sampler
from runtime.scheduling.job import Job
from runtime.scheduling.scheduler import Limits, Scheduler
from runtime.tree import Tree, chain

pytest.importorskip("cuda.bindings")

from tests.passes import run_one
from tests.runtime.engines.gpu_engines import LIMITS, make_plan, use_gpu, use_gpu_of_onnxruntime
from tests.runtime.engines.simulated_gpu import SimulatedDriver
from tests.runtime.scheduling.test_scheduler import Told

# No power of two: passes have 1, 2, 4 or 6 places.
MANY = replace(LIMITS, max_batch=6)
Opened = tuple[Generator, SimulatedDriver]
Open = Callable[..., Opened]


@pytest.fixture(scope="module", params=["plan", "onnxruntime"])
def gpu(request: pytest.FixtureRequest, tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Opens the tiny engine on a simulated GPU: a plan for six requests, or the portable graph."""
    with pytest.MonkeyPatch.context() as patch:
        is_plan = request.param == "plan"
        path = make_plan(tiny_engine, tmp_path_factory.mktemp("gpu"), MANY, patch) if is_plan else tiny_engine

        def opened(memory: int = 1 << 34, **options: Any) -> Opened:
            driver = (use_gpu if is_plan else use_gpu_of_onnxruntime)(path, patch, memory=memory)
            return Generator(path, device="cuda", **options), driver

        yield opened


@pytest.fixture(scope="module")
def opened(gpu: Open) -> Opened:
    return gpu()


@pytest.fixture(scope="module")
def engine(opened: Opened) -> DeviceEngine:
    engine = opened[0].engine
    assert isinstance(engine, DeviceEngine)
    return engine


@pytest.fixture(scope="module")
def alone(tiny_engine: Path) -> Callable[..., list[int]]:
    """Returns the tokens of a request that runs by itself, on the CPU and without drafts."""
    generator = Generator(tiny_engine, threads=1, adapt=False, prefix_cache_bytes=0)
    known: dict[tuple[object, ...], list[int]] = {}

    def tokens(prompt: Sequence[int], count: int, seed: int | None) -> list[int]:
        key = (*prompt, count, seed)
        if key not in known:
            found = generator.generate(
                Tokens(prompt), max_new_tokens=count, speculate=False, sampling=sampling_of(seed)
            )
            known[key] = found.tokens
        return known[key]

    return tokens


def sampling_of(seed: int | None) -> Sampling:
    return Sampling() if seed is None else Sampling(temperature=0.9, top_p=0.9, seed=seed)


def job_of(generator: Generator, prompt: Sequence[int], sizes: TreeSizes, count: int, seed: int | None) -> Job:
    about = generator.about
    sampling = sampling_of(seed)
    sampler = Sampler(sampling, prompt, about.dims.vocab_size, about.stop_tokens)
    drafter = generator.new_drafter(FixedSizes(sizes), sampling.temperature, sampler.noise)
    stops = about.stop_tokens.__contains__
    state = DecodingState(prompt, drafter, about.prompt_chunk, about.dims.join_order, sampler, count, stops)
    return Job(state, 1 << 30, listener=Told())


# Few, so that what each has alone is known soon: they cross capacities of 16, 32, 64 and 128 rows, and begin alike.
PROMPTS = [[5] * 3, [7, 8, 9] * 7, [7, 8, 9] * 14, [11 + n % 50 for n in range(90)]]
TREES = [TreeSizes(1, (0, 0, 0)), TreeSizes(3, (1, 0, 0)), TreeSizes(4, (4, 2, 2)), TreeSizes(9, (9, 9, 9))]
asked = st.tuples(
    st.sampled_from(PROMPTS),
    st.sampled_from(TREES),
    st.sampled_from([1, 6, 25]),
    st.sampled_from([None, 3]),
    # The step that it comes at, and that at which it is cancelled, if ever.
    st.integers(0, 12),
    st.one_of(st.none(), st.integers(0, 20)),
)
# What all of them have room in, in requests of the longest context.
memories = st.sampled_from([1.0, 1.6, 100.0])


@settings(max_examples=40)
@given(st.lists(asked, min_size=1, max_size=9), memories, st.booleans(), st.integers(1, 9))
def test_whatever_joins_leaves_grows_and_moves_each_request_has_the_tokens_that_it_has_alone(
    opened: Opened,
    alone: Callable[..., list[int]],
    requests: list[tuple[list[int], TreeSizes, int, int | None, int, int | None]],
    memory: float,
    keeps: bool,
    most: int,
) -> None:
    generator, _ = opened
    engine = generator.engine
    assert isinstance(engine, DeviceEngine)
    footprint, rows = engine.budget.footprint, int(memory * engine.budget.slot_rows)
    limits = Limits(most, rows, 100 if keeps else 0, generator.about.prompt_chunk, footprint=footprint)
    scheduler = Scheduler(engine, limits, checked=True)
    jobs = [job_of(generator, prompt, sizes, count, seed) for prompt, sizes, count, seed, _, _ in requests]
    for step in itertools.count():
        for job, (*_, begins, leaves) in zip(jobs, requests, strict=True):
            if begins == step:
                scheduler.add(job)
            elif leaves == step:
                scheduler.cancel(job)
        if scheduler.idle and step > 12:
            break
        scheduler.step()
        assert step < 1000, "a step after which nothing is nearer to its end"
        assert engine.cache.in_use == len(scheduler.running)
    for job, (prompt, _, count, seed, begins, leaves) in zip(jobs, requests, strict=True):
        listener = job.listener
        assert isinstance(listener, Told)
        assert listener.error is None
        expected = alone(prompt, count, seed)
        if leaves is None or leaves <= begins:
            assert listener.ended
            assert job.state.tokens == expected
        else:
            assert job.state.tokens == expected[: len(job.state.tokens)]
    scheduler.close(EngineError("over"))
    assert engine.cache.in_use == 0


@pytest.mark.parametrize("share", [1.0, 1.6, 4.0])
def test_memory_stays_within_what_was_given_whatever_runs(
    gpu: Open, alone: Callable[..., list[int]], share: float
) -> None:
    about = gpu()[0].about
    given = int(share * 320 * about.dims.row_bytes)
    generator, _ = gpu(gpu_memory_bytes=given)
    engine = generator.engine
    assert isinstance(engine, DeviceEngine)
    run = engine.run
    most = []

    def watched(batch: Batch) -> Any:
        result = run(batch)
        most.append(engine.cache.bytes)
        return result

    engine.run = watched  # type: ignore[method-assign]
    asked = [(PROMPTS[number % 4], (6, 25)[number % 2]) for number in range(9)]
    # Twice: the second time with what the first has left behind.
    for _ in range(2):
        requests = [generator.submit(Tokens(prompt), max_new_tokens=count) for prompt, count in asked]
        for request, (prompt, count) in zip(requests, asked, strict=True):
            assert request.result().tokens == alone(prompt, count, None)
    assert given // 4 < max(most) <= given
    assert generator.metrics()["reserved_rows"] <= given // about.dims.row_bytes


def test_one_request_more_than_there_is_memory_for_waits(gpu: Open) -> None:
    generator, _ = gpu(gpu_memory_bytes=330 * gpu()[0].about.dims.row_bytes, prefix_cache_bytes=0)
    requests = [generator.submit(Tokens([5] * 150), max_new_tokens=20) for _ in range(3)]
    found = [request.result().tokens for request in requests]
    assert found[0] == found[1] == found[2]
    # They have the longest context each, and there is room for one of that.
    assert generator.metrics()["preemptions"] or generator.metrics()["most_running"] == 1


def test_memory_that_others_have_taken_meanwhile_is_one_clear_error_for_all(gpu: Open) -> None:
    generator, driver = gpu(prefix_cache_bytes=0)
    driver._memory = sum(map(len, driver._allocations.values())) + 40_000
    requests = [generator.submit(Tokens([5] * 90), max_new_tokens=20) for _ in range(3)]
    for request in requests:
        with pytest.raises(EngineError, match=r"^the engine failed: the GPU has too little memory: .*gpu_memory_bytes"):
            request.result()
    with pytest.raises(EngineError, match="too little memory"):
        generator.generate("more")


def test_too_little_memory_for_a_request_is_told_when_it_is_asked(gpu: Open) -> None:
    row = gpu()[0].about.dims.row_bytes
    generator, _ = gpu(gpu_memory_bytes=100 * row)
    with pytest.raises(
        InputError, match=r"need \d+ rows of the cache, and gpu_memory_bytes allows 64; raise it, or lower max_new"
    ):
        generator.submit(Tokens([5] * 60))
    assert len(generator.generate(Tokens([5] * 9), max_new_tokens=9).tokens) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory_bytes": -1}, "gpu_memory_bytes must be at least 0, not -1"),
        ({"gpu_memory_bytes": "1 GB"}, "gpu_memory_bytes must be a whole number, not '1 GB'"),
        ({"gpu_memory_bytes": 1 << 50}, r"gpu_memory_bytes is 1125899906842624, and of the GPU's memory \d+ bytes are"),
        ({"gpu_memory_bytes": 1000}, r"gpu_memory_bytes is 1000, and this engine needs \d+ at least; give more"),
        ({"cache_bytes": 1 << 20}, "cache_bytes is for engines on the CPU; on a GPU give gpu_memory_bytes"),
    ],
)
def test_memory_that_cannot_be_given(gpu: Open, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gpu(**options)


def test_memory_of_a_gpu_is_not_for_an_engine_on_the_cpu(tiny_engine: Path) -> None:
    with pytest.raises(InputError, match="gpu_memory_bytes is for engines on a GPU; leave it out, or give cache_bytes"):
        Generator(tiny_engine, gpu_memory_bytes=1 << 30)


def committed(engine: DeviceEngine, tokens: Sequence[int]) -> PlacedSlot:
    """Return a new slot with the rows of `tokens`."""
    slot = engine.new_slot()
    for start in range(0, len(tokens), 16):
        part = tokens[start : start + 16]
        engine.commit(run_one(engine, prompt_rows(part, engine.dims.join_order, start), slot), [range(len(part))])
    return slot


def tree_rows(engine: DeviceEngine, tokens: Sequence[int], start: int) -> Any:
    nothing = (np.empty(0, dtype=np.int64),) * engine.dims.num_steps
    return lay_out(chain(tokens), nothing, engine.dims.join_order, start)


def logits_after(engine: DeviceEngine, slot: PlacedSlot) -> np.ndarray:
    return np.array(run_one(engine, prompt_rows([11], engine.dims.join_order, slot.length), slot).outputs(0).logits[0])


def test_rows_are_copied_out_of_a_slot_that_runs(engine: DeviceEngine) -> None:
    tokens = [(7 * position) % 250 + 3 for position in range(40)]
    expected = logits_after(engine, committed(engine, tokens[:33]))
    running, others = committed(engine, tokens), committed(engine, [9] * 20)
    target = engine.new_slot()
    engine.copy(running, target, 33)
    np.testing.assert_allclose(logits_after(engine, target), expected, atol=1e-5)
    assert (running.length, others.length, target.length) == (40, 20, 33)


def test_a_slot_that_is_dropped_in_a_pass_is_free_after_it(engine: DeviceEngine) -> None:
    expected = logits_after(engine, committed(engine, [3, 4, 5, 6]))
    dropped, slot = committed(engine, [9] * 30), committed(engine, [3, 4])
    before = engine.cache.in_use
    result = engine.run(Batch.of([tree_rows(engine, [8], 30), tree_rows(engine, [5, 6, 7], 2)], [dropped, slot]))
    del dropped
    engine.commit(result, [(), (0, 1)])
    np.testing.assert_allclose(logits_after(engine, slot), expected, atol=1e-5)
    del result
    assert engine.cache.in_use == before - 1


def test_requests_of_a_pass_accept_what_they_like_and_others_rows_stay(engine: DeviceEngine) -> None:
    texts = [[3, 4, 5], [6] * 14, [7, 8], [9] * 31, [10]]
    slots = [committed(engine, text) for text in texts]
    alone = [logits_after(engine, committed(engine, [*text, 20, 22])) for text in texts]
    same = [logits_after(engine, committed(engine, text)) for text in texts]
    # Of the five, three are in the pass, in another order; two of them accept two rows, one nothing.
    asked = [4, 1, 2]
    tree = Tree(np.array([20, 21, 22]), np.array([-1, 0, 0]), np.array([0, 1, 1]), np.ones(3))
    nothing = (np.empty(0, dtype=np.int64),) * engine.dims.num_steps
    rows = [lay_out(tree, nothing, engine.dims.join_order, slots[index].length) for index in asked]
    engine.commit(engine.run(Batch.of(rows, [slots[index] for index in asked])), [(0, 2), (), (0, 2)])
    for index, slot in enumerate(slots):
        expected = alone if index in (4, 2) else same
        np.testing.assert_allclose(logits_after(engine, slot), expected[index], atol=1e-5)


def test_what_is_no_number_does_not_outlive_its_request(opened: Opened, engine: DeviceEngine) -> None:
    _, driver = opened
    expected = logits_after(engine, committed(engine, [3, 4, 5]))
    neighbour, broken = committed(engine, [6, 7]), committed(engine, [9] * 20)
    engine._cuda.synchronise()
    size = engine.cache.capacity * engine.dims.key_value_heads * engine.dims.head_dim * 4
    for layer in range(engine.dims.num_layers):
        for address in engine.cache.addresses(layer, broken.place.index):
            driver.at(address, size).view(np.float32).fill(np.nan)
    # It is moved, its place is used by another, and so is the one that it is moved to.
    engine.release(neighbour)
    run_one(engine, tree_rows(engine, [1], 20), broken)
    one = committed(engine, [3, 4, 5])
    engine.release(broken)
    two = committed(engine, [3, 4, 5])
    for slot in (one, two):
        np.testing.assert_allclose(logits_after(engine, slot), expected, atol=1e-5)


def test_few_graphs_are_held_and_those_used_last(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: Callable[..., list[int]]
) -> None:
    plan = make_plan(tiny_engine, tmp_path, MANY, monkeypatch)
    driver = use_gpu(plan, monkeypatch)
    monkeypatch.setattr(capturing_engine, "MOST_PASSES", 3)
    generator = Generator(plan)
    engine = generator.engine
    assert isinstance(engine, TensorRTEngine)
    for count in (1, 5, 2, 4, 1, 6):
        requests = [generator.submit(Tokens(PROMPTS[n % 4]), max_new_tokens=25) for n in range(count)]
        for n, request in enumerate(requests):
            assert request.result().tokens == alone(PROMPTS[n % 4], 25, None)
        assert len(engine._passes) <= 3
        assert len(driver._graphs) <= 3
    # Padded to six, the passes of five are those of six.
    assert {key[0] for key in engine._passes} <= {1, 2, 4, 6}
    assert driver.launched_graphs > 10


def test_after_warming_up_few_requests_or_many_find_their_graphs(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tiny_engine, tmp_path, MANY, monkeypatch)
    use_gpu(plan, monkeypatch)
    generator = Generator(plan)
    engine = generator.engine
    assert isinstance(engine, TensorRTEngine)
    generator.warm_up()
    captured, shapes = engine.captured
    assert captured
    for count in range(1, 7):
        for speculate in (True, False):
            generator.generate([Tokens([7, count])] * count, max_new_tokens=3, speculate=speculate)
    assert engine.captured[1] == shapes


def test_a_plan_of_an_earlier_release_says_what_to_do(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tiny_engine, tmp_path, MANY, monkeypatch, entry="commit_kernel")
    use_gpu(plan, monkeypatch)
    with pytest.raises(
        EngineFileError,
        match=r"engine\.plan: its kernels are of an earlier release, which committed one request at a time; export it",
    ):
        Generator(plan)
