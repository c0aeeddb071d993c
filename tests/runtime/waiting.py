"""What tests of many requests wait for, and what makes requests wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from runtime import Generator


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until `condition` holds; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)


def idle(generator: Generator) -> bool:
    """Return whether no request runs or waits."""
    found = generator.metrics()
    return not found["running"] and not found["waiting"]


class Gate:
    """A processor that holds its request up, and with it the engine's thread, until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        self.reached.set()
        assert self.open.wait(60)
        return logits
