"""Checks of numbers that users give: the offending value, and what is allowed, in one line."""

from __future__ import annotations

import math
from numbers import Integral, Real

from runtime.errors import InputError

MOST_THREADS = 1024


def number(name: str, value: object, least: float, most: float) -> float:
    """Return `value` as a float; raise `InputError` unless it is a number from `least` to `most`."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputError(f"{name} must be a number from {least:g} to {most:g}, not {value!r}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    # False for NaN too.
    if not least <= found <= most:
        raise InputError(f"{name} must be from {least:g} to {most:g}, not {found}")
    return found


def whole(name: str, value: object, least: int = 0, most: float = math.inf) -> int:
    """Return `value` as an int; raise `InputError` unless it is a whole number from `least` to `most`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InputError(f"{name} must be a whole number, not {value!r}")
    found = int(value)
    if found < least:
        raise InputError(f"{name} must be at least {least}, not {found}")
    if found > most:
        raise InputError(f"{name} must be at most {most}, not {found}")
    return found
