"""Memory that is free when a scope ends."""

from __future__ import annotations

import gc
from typing import TypeVar

Result = TypeVar("Result")


def collected(result: Result) -> Result:
    """Return what a stage has returned, when the memory of all else that it made is free.

    Models, graphs and tracers are full of reference cycles, which Python frees when its collector next runs. Until then
    the next stage's memory would come on top, and deleted files that a graph maps would still take the disk.
    """
    gc.collect()
    return result
