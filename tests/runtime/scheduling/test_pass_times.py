"""The time of passes: from what was measured, and corrected by what they take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.drafting.sizing import BatchMenu, Menu
from runtime.scheduling.pass_times import PassTimes
from runtime.tree import TreeSizes

PLAIN = TreeSizes.plain(3)
SIZES = (PLAIN, TreeSizes(2, (0, 0, 0)), TreeSizes(2, (2, 0, 0)), TreeSizes(4, (4, 2, 2)))
costs = st.tuples(st.floats(0.0, 0.3), st.floats(0.01, 0.06), st.floats(0.005, 0.03))
PASSES = [(0, 0), (3, 2), (8, 0), (12, 8), (0, 4), (30, 30)]


def relative(cost: tuple[float, float, float], rows: int, pseudo_rows: int) -> float:
    step, row, pseudo_row = cost
    return 1 + step * (rows + pseudo_rows > 0) + row * rows + pseudo_row * pseudo_rows


def menu(cost: tuple[float, float, float], requests: int = 4, plain: float = 0.02) -> BatchMenu:
    times = [
        plain * relative(cost, requests * (size.tree_rows - 1), requests * sum(size.pseudo_rows)) for size in SIZES
    ]
    return BatchMenu(requests, Menu(SIZES, (128,), np.array([times])))


@given(costs)
def test_what_was_measured_is_expected(cost: tuple[float, float, float]) -> None:
    times = PassTimes(menu(cost), 4)
    assert times.plain(128) == pytest.approx(0.02)
    for rows, pseudo_rows in PASSES:
        expected = relative(cost, rows, pseudo_rows)
        assert times.relative(rows, pseudo_rows) == pytest.approx(expected, rel=0.25)


@given(costs, costs, st.floats(0.6, 1.6), st.integers(0, 99))
def test_what_was_measured_badly_is_corrected(
    believed: tuple[float, float, float], true: tuple[float, float, float], slower: float, seed: int
) -> None:
    times = PassTimes(menu(believed), 4)
    rng = np.random.default_rng(seed)
    for _ in range(400):
        rows, pseudo_rows = PASSES[rng.integers(len(PASSES))]
        seconds = 0.02 * slower * relative(true, rows, pseudo_rows) * rng.uniform(0.95, 1.05)
        times.learn(128, rows, pseudo_rows, seconds)
    assert times.plain(128) == pytest.approx(0.02 * slower, rel=0.2)
    for rows, pseudo_rows in PASSES:
        assert times.relative(rows, pseudo_rows) == pytest.approx(relative(true, rows, pseudo_rows), rel=0.25)


@given(costs, st.lists(st.floats(1e-6, 1e3), max_size=30))
def test_costs_are_never_negative_whatever_a_pass_takes(cost: tuple[float, float, float], seconds: list[float]) -> None:
    times = PassTimes(menu(cost), 4)
    for index, one in enumerate(seconds):
        times.learn(128, *PASSES[index % len(PASSES)], one)
    assert min(times.step, times.row, times.pseudo_row) >= 0.0
    assert 0.0 < times.plain(128) < np.inf


def test_a_pass_that_was_disturbed_changes_little() -> None:
    times = PassTimes(menu((0.1, 0.04, 0.02)), 4)
    times.learn(128, 0, 0, 5.0)
    assert times.plain(128) < 0.022
    before = times.relative(8, 4)
    times.learn(128, 8, 4, 5.0)
    assert times.relative(8, 4) < 1.3 * before
