"""One run under load: what every request took, and what the engine did meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ht_export.bench.load.arrivals import Arrivals
from ht_export.bench.settings import Job
from runtime.errors import BusyError
from runtime.generator import Generator
from runtime.request import Request

# Seconds between two looks at how many requests run and wait.
LOOK = 0.05


@dataclass(frozen=True)
class Answered:
    """One request: the number of its `job`, its new `tokens`; seconds to the first of them, and between each of them
    and the one before.

    Tokens that one step made certain share the time of that step: it is divided among them.
    """

    job: int
    tokens: list[int]
    first_token_s: float
    between_s: list[float]
    accepted: tuple[int, ...]


@dataclass
class Run:
    """One run: `seconds` from the first request to the last answer; `looks` has (seconds, running, waiting) over time;
    `metrics` are those of the generator, for this run alone.
    """

    answers: list[Answered] = field(default_factory=list)
    refused: int = 0
    seconds: float = 0.0
    looks: list[tuple[float, int, int]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)


def run(
    generator: Generator,
    arrivals: Arrivals,
    jobs: Sequence[Job],
    options: dict[str, Any],
    tick: Callable[[], None] = lambda: None,
) -> Run:
    """Send `jobs` as they arrive and wait for all answers; `tick` is called after each."""
    found = Run()
    lock = threading.Lock()
    before = generator.metrics()
    start = time.perf_counter()

    def keep(number: int, request: Request) -> None:
        request.result()
        answered = _answered(number, list(request))
        with lock:
            found.answers.append(answered)
            tick()

    with _Looking(generator, start, found.looks):
        if arrivals.clients:
            waiting = iter(range(len(jobs)))

            def client() -> None:
                while True:
                    with lock:
                        number = next(waiting, None)
                    if number is None:
                        return
                    keep(number, generator.submit(jobs[number].text, sampling=jobs[number].sampling, **options))

            with ThreadPoolExecutor(arrivals.clients) as pool:
                for done in [pool.submit(client) for _ in range(arrivals.clients)]:
                    done.result()
        else:
            requests: list[tuple[int, Request]] = []
            for number, at in enumerate(arrivals.times[: len(jobs)]):
                time.sleep(max(0.0, start + at - time.perf_counter()))
                try:
                    job = jobs[number]
                    requests.append((number, generator.submit(job.text, sampling=job.sampling, **options)))
                except BusyError:
                    found.refused += 1
            for number, request in requests:
                keep(number, request)
    found.seconds = time.perf_counter() - start
    found.metrics = _difference(generator.metrics(), before)
    return found


def _answered(job: int, chunks: Sequence[Any]) -> Answered:
    tokens = [token for chunk in chunks for token in chunk.tokens]
    times = [(chunk.seconds, len(chunk.tokens)) for chunk in chunks if chunk.tokens]
    between = [(end - start) / count for (start, _), (end, count) in pairwise(times) for _ in range(count)]
    return Answered(job, tokens, times[0][0], between, chunks[-1].result.accepted)


def _difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return what was counted between two looks at metrics."""
    found: dict[str, Any] = {}
    for name, value in after.items():
        earlier = before[name]
        if isinstance(value, dict):
            counts = [one - other for one, other in zip(value["counts"], earlier["counts"], strict=True)]
            found[name] = {"bounds": value["bounds"], "counts": counts}
        elif isinstance(value, list):
            found[name] = [one - (earlier[place] if place < len(earlier) else 0) for place, one in enumerate(value)]
        elif name.startswith("most_") or name in ("running", "waiting", "max_queue", "cache_rows", "reserved_rows"):
            found[name] = value
        else:
            found[name] = value - earlier
    return found


class _Looking:
    """Looks at the generator now and then, in the block."""

    def __init__(self, generator: Generator, start: float, looks: list[tuple[float, int, int]]) -> None:
        self._generator = generator
        self._start = start
        self._looks = looks
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOK):
            state = self._generator.metrics()
            self._looks.append((time.perf_counter() - self._start, state["running"], state["waiting"]))
