"""One generator for many threads and tasks: who gets what, who waits, and what ends when."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import (
    BusyError,
    CancelledError,
    ClosedError,
    DeadlineError,
    EngineError,
    Generator,
    InputError,
    Request,
    Sampling,
    ServiceError,
    Tokens,
    TreeSizes,
)
from runtime.scheduling.prefixes import SHORTEST
from tests.runtime.waiting import Gate, idle, until

PROMPTS = ["Hello", "x" * 40, "The sky is blue, the sky is", "a", "Why?", "Ünïcödé"]


@pytest.fixture(scope="module")
def generator(tiny_engine: Path) -> Iterator[Generator]:
    with Generator(tiny_engine, threads=1, adapt=False) as generator:
        yield generator


@pytest.fixture(scope="module")
def alone(generator: Generator) -> list[list[int]]:
    """The tokens of each prompt, asked one after another."""
    return [generator.generate(prompt, max_new_tokens=30, speculate=False).tokens for prompt in PROMPTS]


@pytest.fixture
def small(tiny_engine: Path) -> Iterator[Callable[..., Generator]]:
    """Makes generators that are closed at the end."""
    made: list[Generator] = []

    def make(**options: Any) -> Generator:
        made.append(Generator(tiny_engine, threads=1, adapt=False, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_list_of_prompts_gives_a_list_of_answers_in_order(generator: Generator, alone: list[list[int]]) -> None:
    found = generator.generate(PROMPTS, max_new_tokens=30)
    assert [result.tokens for result in found] == alone
    assert generator.metrics()["most_running"] > 1


def test_every_kind_of_prompt_may_be_in_a_list(generator: Generator, alone: list[list[int]]) -> None:
    messages = [{"role": "user", "content": PROMPTS[0]}]
    tokens = Tokens(generator.encode(PROMPTS[0]))
    found = generator.generate([PROMPTS[0], messages, tokens], max_new_tokens=30)
    assert [result.tokens for result in found] == [alone[0]] * 3
    assert generator.generate(tokens, max_new_tokens=30).tokens == alone[0]
    assert generator.generate(messages, max_new_tokens=30).tokens == alone[0]
    (one,) = generator.generate([PROMPTS[0]], max_new_tokens=30)
    assert one.tokens == alone[0]


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ([], "there is no prompt in an empty list"),
        ([{"role": "user", "content": "a"}, "b"], "a list of messages is one prompt, and this one has other things"),
        (["a", 5], r"prompt 1 of the list is 5, .*wrap token ids in runtime.Tokens"),
        ([1, 2, 3], "wrap token ids in runtime.Tokens"),
        (["a", None], "prompt 1 of the list is None"),
        (["a", True], "prompt 1 of the list is True"),
        (Tokens([1, 99999]), "each token of a prompt must be at most 263, not 99999"),
        (Tokens([-1]), "each token of a prompt must be at least 0"),
        (Tokens([1.5]), "each token of a prompt must be a whole number"),  # type: ignore[list-item]
        (Tokens([]), "the prompt is empty"),
        (Tokens([1] * 300), "the prompt has 300 tokens, and the engine's context limit is 256"),
    ],
)
def test_what_is_no_prompt_is_one_error(generator: Generator, prompt: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        generator.generate(prompt, max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"n": 5000}, "n must be at most 1024"),
        ({"n": 1.5}, "n must be a whole number"),
        ({"priority": 10**9}, "priority must be at most 1000"),
        ({"priority": "high"}, "priority must be a whole number, not 'high'"),
        ({"deadline_s": -1}, "deadline_s must be from 0 to 86400, not -1"),
        ({"deadline_s": float("nan")}, "deadline_s must be from 0"),
        ({"deadline_s": "soon"}, "deadline_s must be a number"),
    ],
)
def test_an_option_that_does_not_fit_is_one_error(generator: Generator, options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        generator.generate("Hello", **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"max_queue": 0}, "max_queue must be at least 1"),
        ({"max_stall_ms": 0}, "max_stall_ms must be from 1"),
        ({"cache_bytes": 1000}, "cache_bytes is 1000, and this engine needs"),
        ({"cache_bytes": -5}, "cache_bytes must be at least 0"),
        ({"prefix_cache_bytes": "x"}, "prefix_cache_bytes must be a whole number"),
    ],
)
def test_an_option_of_a_generator_that_does_not_fit_is_one_error(
    tiny_engine: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        Generator(tiny_engine, threads=1, adapt=False, **options)


def test_an_unknown_option_is_a_type_error(generator: Generator) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        generator.generate("Hello", max_tokens=5)  # type: ignore[call-overload]


def test_several_answers_to_one_prompt_are_those_of_their_seeds(generator: Generator) -> None:
    sampling = Sampling(temperature=1.0, seed=(1 << 64) - 2)
    found = generator.generate("Hello", n=4, max_new_tokens=20, sampling=sampling)
    assert [result.seed for result in found] == [(1 << 64) - 2, (1 << 64) - 1, 0, 1]
    for result in found:
        again = Sampling(temperature=1.0, seed=result.seed)
        assert generator.generate("Hello", max_new_tokens=20, sampling=again).tokens == result.tokens
    assert len({tuple(result.tokens) for result in found}) == 4
    both = generator.generate(["Hello", "a"], n=2, max_new_tokens=5, sampling=sampling)
    assert [len(answers) for answers in both] == [2, 2]
    assert both[0][0].tokens == found[0].tokens[:5]
    unseeded = generator.generate("Hello", n=2, max_new_tokens=5, sampling=Sampling(temperature=1.0))
    assert unseeded[0].seed != unseeded[1].seed


def test_answers_to_one_prompt_share_its_rows(small: Callable[..., Generator]) -> None:
    generator = small()
    results = generator.generate("x" * 60, n=3, max_new_tokens=4, sampling=Sampling(temperature=1.0, seed=0))
    first, *others = (result.cached_prompt_tokens for result in results)
    # Where only a few rows are missing nobody waits for them.
    least = results[0].prompt_tokens - 1 - SHORTEST
    assert first == 0
    assert all(cached >= least for cached in others)
    generator = small(prefix_cache_bytes=0)
    results = generator.generate("x" * 60, n=3, max_new_tokens=4, sampling=Sampling(temperature=1.0, seed=0))
    assert [result.cached_prompt_tokens for result in results] == [0, 0, 0]


def test_many_threads_each_get_their_own_text(generator: Generator, alone: list[list[int]]) -> None:
    def ask(number: int) -> bool:
        index = number % len(PROMPTS)
        if number % 3:
            return generator.generate(PROMPTS[index], max_new_tokens=30).tokens == alone[index]
        chunks = list(generator.stream(PROMPTS[index], max_new_tokens=30))
        assert chunks[-1].result is not None
        return [token for chunk in chunks for token in chunk.tokens] == alone[index]

    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(ask, range(60)))


def test_tasks_each_get_their_own_text(generator: Generator, alone: list[list[int]]) -> None:
    async def streamed(prompt: str) -> list[int]:
        return [token async for chunk in generator.astream(prompt, max_new_tokens=30) for token in chunk.tokens]

    async def everything() -> None:
        whole = await asyncio.gather(*(generator.agenerate(prompt, max_new_tokens=30) for prompt in PROMPTS))
        assert [result.tokens for result in whole] == alone
        assert await asyncio.gather(*map(streamed, PROMPTS)) == alone
        request = await asyncio.to_thread(generator.submit, PROMPTS[0], max_new_tokens=30)
        assert [token async for chunk in request for token in chunk.tokens] == alone[0]
        assert (await request.aresult()).tokens == alone[0]

    asyncio.run(everything())


def test_a_request_is_an_iterator_and_has_a_result(generator: Generator, alone: list[list[int]]) -> None:
    request = generator.submit(PROMPTS[0], max_new_tokens=30)
    assert [token for chunk in request for token in chunk.tokens] == alone[0]
    assert request.done
    assert request.result().tokens == alone[0]
    assert list(request) == []
    # Over already: nothing happens.
    request.cancel()
    assert request.result().tokens == alone[0]


def ends_early(generator: Generator, end: Callable[[Request], None]) -> None:
    before = generator.metrics()["cancelled"]
    request = generator.submit("Hello", max_new_tokens=200)
    next(request)
    end(request)
    del request
    gc.collect()
    until(lambda: idle(generator))
    assert generator.metrics()["cancelled"] == before + 1


def test_a_request_ends_when_it_is_cancelled_closed_or_dropped(generator: Generator) -> None:
    ends_early(generator, lambda request: request.cancel())
    ends_early(generator, lambda request: request.close())
    ends_early(generator, lambda request: None)
    request = generator.submit("Hello", max_new_tokens=200)
    request.cancel()
    with pytest.raises(CancelledError, match="the request was cancelled"):
        request.result()
    with pytest.raises(CancelledError):
        list(request)


def test_a_task_that_is_cancelled_ends_its_request(small: Callable[..., Generator]) -> None:
    generator = small()

    async def left() -> None:
        before = generator.metrics()["cancelled"]
        task = asyncio.create_task(generator.agenerate("Hello", max_new_tokens=200))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async for _ in (stream := generator.astream("Hello", max_new_tokens=200)):
            break
        await stream.aclose()  # type: ignore[attr-defined]
        while not idle(generator):
            await asyncio.sleep(0.002)
        assert generator.metrics()["cancelled"] == before + 2

    asyncio.run(left())


def test_a_loop_that_is_closed_harms_nobody(generator: Generator, alone: list[list[int]]) -> None:
    async def begin() -> Request:
        request = generator.submit("Hello", max_new_tokens=100)
        waiting.append(asyncio.ensure_future(request.aresult()))
        await asyncio.sleep(0.01)
        return request

    waiting: list[object] = []
    loop = asyncio.new_event_loop()
    request = loop.run_until_complete(begin())
    loop.close()
    assert len(request.result().tokens) > 30
    assert generator.generate(PROMPTS[0], max_new_tokens=30).tokens == alone[0]


def test_a_full_queue_refuses_and_says_so(small: Callable[..., Generator]) -> None:
    generator, gate = small(max_batch=1, max_queue=2), Gate()
    held = generator.submit("Hello", max_new_tokens=3, sampling=Sampling(processors=[gate]))
    assert gate.reached.wait(30)
    queued = [generator.submit("a", max_new_tokens=2) for _ in range(2)]
    with pytest.raises(
        BusyError, match="the queue is full: 2 requests wait for 1 that run, and max_queue is 2"
    ) as full:
        generator.submit("a")
    assert not isinstance(full.value, InputError)
    assert (full.value.waiting, full.value.running, full.value.max_queue) == (2, 1, 2)
    # A cancelled one makes room, before it began.
    queued.pop().cancel()
    gate.open.set()
    assert held.result().tokens
    assert queued[0].result().tokens


def test_more_prompts_than_the_queue_holds_wait_outside(
    small: Callable[..., Generator], alone: list[list[int]]
) -> None:
    generator = small(max_batch=2, max_queue=2)
    found = generator.generate(PROMPTS * 3, max_new_tokens=30)
    assert [result.tokens for result in found] == alone * 3


def test_a_deadline_ends_what_runs_and_refuses_what_waits(small: Callable[..., Generator]) -> None:
    generator, gate = small(max_batch=1), Gate()
    held = generator.submit("Hello", max_new_tokens=100, deadline_s=0.2, sampling=Sampling(processors=[gate]))
    waiting = generator.submit("Hello", max_new_tokens=5, deadline_s=0.1)
    assert gate.reached.wait(30)
    time.sleep(0.3)
    gate.open.set()
    result = held.result()
    assert result.finish_reason == "deadline"
    assert 0 < len(result.tokens) < 100
    whole = generator.generate("Hello", max_new_tokens=100)
    assert result.tokens == whole.tokens[: len(result.tokens)]
    assert whole.text.startswith(result.text.rstrip("\ufffd"))
    with pytest.raises(DeadlineError, match="the deadline passed while the request waited"):
        waiting.result()


def test_an_answer_to_what_is_too_long_for_the_cache_is_refused(small: Callable[..., Generator]) -> None:
    generator = small(cache_bytes=64 * 512)
    rows = generator.metrics()["cache_rows"]
    assert rows < 256
    with pytest.raises(InputError, match=f"rows of the cache, and cache_bytes allows {rows}; raise it, or lower"):
        generator.generate("Hello", max_new_tokens=250)


def test_requests_that_do_not_all_fit_the_cache_take_turns(
    tiny_engine: Path, small: Callable[..., Generator], alone: list[list[int]]
) -> None:
    row = small().engine.row_bytes
    generator = small(cache_bytes=160 * row)
    tree = TreeSizes(4, (4, 2, 1))
    found = [generator.submit(prompt, max_new_tokens=30, tree=tree) for prompt in PROMPTS * 2]
    assert [request.result().tokens for request in found] == alone * 2
    state = generator.metrics()
    assert state["most_reserved_rows"] <= state["cache_rows"] == 160
    assert state["most_running"] > 1


def test_closing_ends_what_is_under_way(small: Callable[..., Generator]) -> None:
    generator = small()
    requests = [generator.submit("Hello", max_new_tokens=200) for _ in range(5)]
    next(requests[0])
    generator.close()
    generator.close()
    for request in requests:
        with pytest.raises(ClosedError, match="the generator was closed"):
            request.result()
    with pytest.raises(ClosedError, match="the generator is closed"):
        generator.generate("Hello")
    with pytest.raises(ClosedError):
        generator.drain()


def test_draining_lets_what_is_under_way_end(small: Callable[..., Generator], alone: list[list[int]]) -> None:
    generator = small()
    gate = Gate()
    held = generator.submit("Hello", max_new_tokens=3, sampling=Sampling(processors=[gate]))
    requests = [generator.submit(prompt, max_new_tokens=30) for prompt in PROMPTS]
    assert not generator.drain(timeout=0.05)
    with pytest.raises(ClosedError, match="is being drained and takes no more requests"):
        generator.submit("Hello")
    gate.open.set()
    assert held.result().tokens
    assert [request.result().tokens for request in requests] == alone
    # For as long as it takes, in several calls.
    assert generator.drain(timeout=10)
    assert generator.drain(timeout=10)


def test_a_generator_that_is_dropped_ends_its_thread(tiny_engine: Path) -> None:
    before = set(threading.enumerate())
    generator = Generator(tiny_engine, threads=1, adapt=False)
    request = generator.submit("Hello", max_new_tokens=200)
    next(request)
    # By name: what earlier tests of this process left behind may begin threads meanwhile.
    (own,) = (one for one in set(threading.enumerate()) - before if one.name == "hidden-transfer engine")
    del generator
    gc.collect()
    with pytest.raises(ClosedError):
        request.result()
    until(lambda: not own.is_alive())


def test_an_engine_that_dies_is_an_error_for_all_and_nobody_hangs(
    small: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, gate = small(), Gate()
    held = generator.submit("Hello", max_new_tokens=50, sampling=Sampling(processors=[gate]))
    assert gate.reached.wait(30)
    others = [generator.submit("a", max_new_tokens=50) for _ in range(3)]

    def dead(batch: object) -> None:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(generator.engine, "run", dead)
    gate.open.set()
    for request in (held, *others):
        with pytest.raises(EngineError, match=r"the engine failed .*CUDA_ERROR_ILLEGAL_ADDRESS"):
            request.result()
    with pytest.raises(EngineError):
        generator.submit("Hello")


def test_a_fault_of_the_scheduler_is_an_error_for_all_too(
    small: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = small()

    def broken() -> None:
        raise AssertionError("rows and slots disagree")

    monkeypatch.setattr(generator._service.scheduler, "step", broken)
    request = generator.submit("Hello")
    with pytest.raises(EngineError, match=r"the scheduler failed .*rows and slots disagree"):
        request.result()
    with pytest.raises(ServiceError):
        generator.submit("Hello")


def test_a_processor_that_raises_ends_its_request_alone(generator: Generator, alone: list[list[int]]) -> None:
    def refuse(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        raise LookupError("not this time")

    requests = [
        generator.submit(prompt, max_new_tokens=30, sampling=Sampling(processors=[refuse]) if index == 2 else None)
        for index, prompt in enumerate(PROMPTS)
    ]
    for index, request in enumerate(requests):
        if index == 2:
            with pytest.raises(LookupError, match="not this time"):
                request.result()
        else:
            assert request.result().tokens == alone[index]


def test_warming_up_leaves_nothing_behind(small: Callable[..., Generator], alone: list[list[int]]) -> None:
    generator = small(max_batch=3)
    generator.warm_up()
    assert idle(generator)
    assert generator.generate(PROMPTS[0], max_new_tokens=30).tokens == alone[0]


def test_metrics_are_plain_data(small: Callable[..., Generator]) -> None:
    generator = small()
    generator.generate(PROMPTS, max_new_tokens=5)
    found = generator.metrics()
    assert json.loads(json.dumps(found)) == found
    assert found["finished_requests"] == len(PROMPTS)
    assert found["first_token_seconds"]["count"] == found["started_requests"]
    assert sum(found["batch_sizes"]["counts"]) == found["prompt_passes"] + found["decode_passes"]


SCRIPT = """
import os, sys, threading
from runtime import Generator, ServiceError
generator = Generator(sys.argv[1], threads=1, adapt=False)
"""


def run_program(tiny_engine: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + code, str(tiny_engine)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_program_that_never_closes_its_generator_ends(tiny_engine: Path) -> None:
    done = run_program(
        tiny_engine, "request = generator.submit('Hello', max_new_tokens=240)\nnext(request)\nprint('over')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_after_a_fork_a_generator_refuses_and_the_first_process_goes_on(tiny_engine: Path) -> None:
    done = run_program(
        tiny_engine,
        """
first = generator.generate('Hello', max_new_tokens=20).tokens
request = generator.submit('Hello', max_new_tokens=200)
next(request)
# Held by the thread that forks: a child must not wait for it.
generator._service._changed.acquire()
child = os.fork()
if not child:
    try:
        generator.generate('Hello')
    except ServiceError as error:
        print(error, flush=True)
    request.cancel
    del request
    generator.close()
    os._exit(0)
generator._service._changed.release()
_, status = os.waitpid(child, 0)
assert status == 0
assert generator.generate('Hello', max_new_tokens=20).tokens == first
print(len(request.result().tokens) > 20)
""",
    )
    assert done.stderr == ""
    assert done.stdout.startswith("this generator was made before a fork")
    assert done.stdout.endswith("True\n")
    assert done.returncode == 0
