"""Bounds of statistics that samples from the distribution they should be from keep to."""

import math

import numpy as np


def largest_chi_square(degrees: int) -> float:
    """Return the value that a chi-square statistic exceeds once in 10,000 times (by Wilson and Hilferty)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.719 * math.sqrt(spread)) ** 3


def is_uniform(sample: np.ndarray) -> bool:
    """Return whether numbers of [0, 1] may be uniform, by a Kolmogorov-Smirnov test that errs once in 10,000 times."""
    ordered = np.sort(sample)
    count = len(ordered)
    places = np.arange(count)
    distance = max((ordered - places / count).max(), ((places + 1) / count - ordered).max())
    return bool(distance * math.sqrt(count) < 2.225)
