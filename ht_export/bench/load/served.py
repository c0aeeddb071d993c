"""A server under load, whichever it is: what each request took, and whether every text is that of its request alone."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ht_export.bench.load.arrivals import Arrivals
from ht_export.bench.load.calling import Caller, Heard
from ht_export.bench.load.summary import QUANTILES

# Of those who leave, the latest leaves after so many pieces of text.
LATEST_LEAVE = 16
# Causes of errors that are told.
TOLD = 10


@dataclass(frozen=True)
class Plan:
    """So many `requests`, or as many as there is time for in `seconds`; this `share` of clients leave mid-stream, as
    the `seed` says.
    """

    requests: int
    seconds: float | None
    share: float
    seed: int


@dataclass
class Served:
    """One run: `seconds` from the first request to the last answer."""

    heard: list[Heard] = field(default_factory=list)
    seconds: float = 0.0


def run(
    caller: Caller, arrivals: Arrivals, texts: Sequence[str], plan: Plan, tick: Callable[[], None] = lambda: None
) -> Served:
    """Ask for answers to `texts`, over and over, as they arrive, and wait for all; `tick` is called after each."""
    found = Served()
    lock = threading.Lock()
    start = time.perf_counter()
    end = None if plan.seconds is None else start + plan.seconds
    numbers = iter(range(plan.requests if end is None else 1 << 62))

    def number() -> int | None:
        with lock:
            return None if end is not None and time.perf_counter() >= end else next(numbers, None)

    def ask(request: int) -> Heard:
        leaves = random.Random(f"{plan.seed} {request}")
        after = leaves.randint(1, LATEST_LEAVE) if leaves.random() < plan.share else None
        job = request % len(texts)
        heard = caller.ask(job, texts[job], after)
        with lock:
            found.heard.append(heard)
            tick()
        return heard

    def client() -> None:
        while (request := number()) is not None:
            heard = ask(request)
            if heard.ending == "refused":
                left = heard.retry_after if end is None else min(heard.retry_after, end - time.perf_counter())
                time.sleep(max(0.0, left))

    with ThreadPoolExecutor(arrivals.clients or len(arrivals.times)) as pool:
        if arrivals.clients:
            for done in [pool.submit(client) for _ in range(arrivals.clients)]:
                done.result()
        else:
            asked = []
            for at in arrivals.times:
                time.sleep(max(0.0, start + at - time.perf_counter()))
                if (request := number()) is not None:
                    asked.append(pool.submit(ask, request))
            for one in asked:
                one.result()
    found.seconds = time.perf_counter() - start
    return found


def summarise(run: Served, alone: Sequence[str]) -> dict[str, Any]:
    """Return what a run came to, as plain data; `alone` are the texts of each job by itself. A text that was left has
    to be a beginning of that.
    """
    endings = Counter(heard.ending for heard in run.heard)
    whole = [heard for heard in run.heard if heard.ending == "whole"]
    other = [heard.job for heard in whole if heard.text != alone[heard.job]]
    other += [
        heard.job for heard in run.heard if heard.ending == "left" and not alone[heard.job].startswith(heard.text)
    ]
    causes = Counter(heard.cause for heard in run.heard if heard.ending == "error")
    between = [late - early for heard in whole for early, late in zip(heard.events, heard.events[1:], strict=False)]
    return {
        "requests": len(run.heard),
        "seconds": run.seconds,
        **{ending: endings[ending] for ending in ("whole", "left", "refused", "error")},
        "errors": dict(causes.most_common(TOLD)),
        "tokens_per_second": sum(heard.tokens for heard in whole) / run.seconds,
        "first_piece_s": _quantiles([heard.events[0] for heard in whole if heard.events]),
        "between_pieces_s": _quantiles(between),
        "request_s": _quantiles([heard.seconds for heard in whole]),
        "refused_s": _quantiles([heard.seconds for heard in run.heard if heard.ending == "refused"]),
        "cached_tokens": sum(heard.cached for heard in whole),
        "other_texts": sorted(other),
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.quantile(values, share)) if values else 0.0 for name, share in QUANTILES.items()}


def to_markdown(results: dict[str, Any]) -> str:
    """Return results as a table, with the conditions in a line above and the checks below."""
    about = results["conditions"]
    lines = [
        "| arrivals | requests | whole | left | refused | errors | tokens/s of whole answers | first piece s: median, "
        "p95, p99 | between pieces ms: the same | whole request s: the same | other texts |",
        "| --- " * 11 + "|",
    ]
    for level in results["levels"]:
        cells = [
            level["arrivals"],
            *(str(level[name]) for name in ("requests", "whole", "left", "refused", "error")),
            f"{level['tokens_per_second']:.1f}",
            ", ".join(f"{level['first_piece_s'][name]:.2f}" for name in QUANTILES),
            ", ".join(f"{1e3 * level['between_pieces_s'][name]:.0f}" for name in QUANTILES),
            ", ".join(f"{level['request_s'][name]:.2f}" for name in QUANTILES),
            str(len(level["other_texts"])),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    told = [
        f"- {level['arrivals']}: {count} times {cause}"
        for level in results["levels"]
        for cause, count in level["errors"].items()
    ]
    head = (
        f"{about['model']} at {about['url']}, {about['prompts']} prompts, up to {about['max_new_tokens']} new tokens, "
        f"{about['date']}"
    )
    return "\n\n".join([head, "\n".join(lines), *(["\n".join(told)] if told else [])])
