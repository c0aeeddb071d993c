"""Checks of numbers that users give: the offending value, and what is allowed, in one line."""

from __future__ import annotations

import math
import os
import warnings
from numbers import Integral, Real
from pathlib import Path

from runtime.errors import InputError, InputWarning, shown

MOST_THREADS = 1024
# More than there is of anything; and what 64 bits hold.
LARGEST = (1 << 63) - 1
# Times that something is measured or trained in a row: more is a mistyped number, and would not end.
MOST_REPEATS = 10**6


def number(name: str, value: object, least: float, most: float) -> float:
    """Return `value` as a float; raise `InputError` unless it is a number from `least` to `most`."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputError(f"{name} must be a number from {least:g} to {most:g}, not {shown(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    # False for NaN too.
    if not least <= found <= most:
        raise InputError(f"{name} must be from {least:g} to {most:g}, not {found}")
    return found


def whole(name: str, value: object, least: int = 0, most: int = LARGEST) -> int:
    """Return `value` as an int; raise `InputError` unless it is a whole number from `least` to `most`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InputError(f"{name} must be a whole number, not {shown(value)}")
    found = int(value)
    if found < least:
        raise InputError(f"{name} must be at least {least}, not {shown(found)}")
    if found > most:
        raise InputError(f"{name} must be at most {most}, not {shown(found)}")
    return found


def check_threads(threads: object) -> None:
    """Raise `InputError` unless `threads` is a number of threads that can be had; warn of more than there are cores."""
    if whole("threads", threads, 1, MOST_THREADS) > (found := cores()):
        warnings.warn(
            f"threads is {threads}, and this process has {found} cores: its threads wait for each other; give at most "
            f"{found}",
            InputWarning,
            # The caller of what takes the number.
            stacklevel=3,
        )


def cores() -> int:
    """Return how many cores this process may use: by its affinity, and by the limit of its container, rounded up."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        # Microseconds of all cores together in each period of so many, as the kernel documents for cgroup v2.
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return min(found, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        # No such limit: there is no file, or its quota is "max".
        return found
