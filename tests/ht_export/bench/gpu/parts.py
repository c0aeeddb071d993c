"""Parts for `test_check`, in a module that their processes import quickly."""

import os
import time
from collections.abc import Iterator


def right(value: int) -> Iterator[tuple[str, int]]:
    yield "first", value
    yield "second", value + 1


def wrong() -> Iterator[tuple[str, int]]:
    yield "first", 1
    raise RuntimeError("the pass failed")


def crash() -> Iterator[tuple[str, int]]:
    yield "first", 1
    os._exit(3)


def hang() -> Iterator[tuple[str, int]]:
    yield "first", 1
    time.sleep(600)
