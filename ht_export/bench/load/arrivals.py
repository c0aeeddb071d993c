"""When requests come: by clients that ask one after another, at random at a rate, or as a trace says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta

from ht_export.formats import LinesFormat
from runtime.errors import InputError

# A week: later than any test of a service goes on.
LATEST = 604800.0


@dataclass(frozen=True)
class Arrivals:
    """A pattern of requests: so many `clients`, each of which asks again when it has its answer; or, with none, a
    request at each of `times`, in seconds from the beginning.
    """

    name: str
    clients: int = 0
    times: tuple[float, ...] = ()


def clients(count: int) -> Arrivals:
    """Return `count` clients in a closed loop."""
    return Arrivals(f"{count} client{'s' if count > 1 else ''}", clients=count)


def poisson(rate: float, requests: int, seed: int) -> Arrivals:
    """Return `requests` arrivals at random, `rate` of them a second."""
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, requests)
    return Arrivals(f"{rate:g} requests/s", times=tuple(np.cumsum(gaps).tolist()))


@dataclass(frozen=True)
class _Arrival:
    """A line of a trace."""

    time: Annotated[float, Meta(ge=0.0, le=LATEST)]


TRACE = LinesFormat(
    "arrival",
    most_bytes=1 << 16,
    remedy="give a JSON-lines file with a 'time' in seconds on each line",
    kind=_Arrival,
)


def trace(path: Path, most: int | None) -> Arrivals:
    """Return the arrivals of a file with a `time` on each line, in any order, the first `most` of them. Raises
    `InputError`.
    """
    if not path.is_file():
        raise InputError(f"no trace at {path}; give a JSON-lines file with a 'time' in seconds on each line")
    times: Sequence[float] = sorted(line.time for _, line in TRACE.lines(path))[:most]
    if not times:
        raise InputError(f"{path} holds no arrivals; give at least one line with a 'time'")
    return Arrivals(f"trace of {len(times)} requests", times=tuple(time - times[0] for time in times))
