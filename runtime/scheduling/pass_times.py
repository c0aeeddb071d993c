"""How long passes of several requests take, by their rows: measured beforehand, and corrected by every pass.

The time of a pass is `scale * plain(context) * (1 + step + row * added rows + pseudo row * pseudo rows)`, where the
step is what any pass of trees costs beyond a plain one, and `plain` is what was measured beforehand. A machine is
busier than it was, or not as busy, so that all passes take longer or less: that is the scale, which follows quickly.
What rows cost beside a plain pass changes little. It is learned by a Kalman filter, which begins with what is usual on
a CPU and takes what was measured beforehand as it takes the time of every pass: no single one is to be trusted.
"""

from __future__ import annotations

import numpy as np

from runtime.arrays import FloatArray
from runtime.drafting.sizing import BatchMenu

# Weight of one plain pass, and of one of trees, in the scale.
PLAIN_STEP, TREE_STEP = 1 / 8, 1 / 32
# Usual costs of a step, and of rows and pseudo rows for one request each; and how far from them others may be.
USUAL = (0.15, 0.15, 0.07)
DOUBT = (0.15, 0.1, 0.05)
# Standard deviation of the time of a pass, in plain ones.
NOISE = 0.1
# What costs may change by in a pass, relative to themselves.
DRIFT = 1e-3
# A pass that takes so many times what was expected was disturbed, and counts for this.
MOST = 1.5


class PassTimes:
    """The time of passes of `requests` requests, measured as `measured` of about as many."""

    def __init__(self, measured: BatchMenu, requests: int) -> None:
        self._requests = requests
        self._menu = measured.menu
        self._scale = 1.0
        each = np.array([1.0, 1 / requests, 1 / requests])
        self._costs = np.array(USUAL) * each
        self._doubt = np.diag((np.array(DOUBT) * each) ** 2)
        self._learn_measured(measured)

    @property
    def step(self) -> float:
        """What any pass of trees costs beyond a plain one, in plain passes."""
        return float(self._costs[0])

    @property
    def row(self) -> float:
        """What one more tree row costs, in plain passes."""
        return float(self._costs[1])

    @property
    def pseudo_row(self) -> float:
        """What a pseudo row costs, in plain passes."""
        return float(self._costs[2])

    def plain(self, context: int) -> float:
        """Return the seconds of a plain pass with `context` tokens in the cache of each."""
        return self._scale * float(self._menu.at(context)[0])

    def relative(self, rows: int, pseudo_rows: int) -> float:
        """Return the time of a pass with `rows` tree rows beyond the root of each, in plain passes."""
        return 1.0 + float(self._costs @ _features(rows, pseudo_rows))

    def learn(self, context: int, rows: int, pseudo_rows: int, seconds: float) -> None:
        """Take note of a pass that took so long."""
        measured = seconds / self.plain(context)
        expected = self.relative(rows, pseudo_rows)
        measured = min(max(measured, expected / MOST), expected * MOST)
        if not rows and not pseudo_rows:
            self._scale *= 1 + PLAIN_STEP * (measured - 1)
            return
        self._scale *= 1 + TREE_STEP * (measured / expected - 1)
        self._doubt += np.diag((DRIFT * self._costs) ** 2)
        self._correct(_features(rows, pseudo_rows), measured)

    def _learn_measured(self, measured: BatchMenu) -> None:
        menu = measured.menu
        relative = (menu.seconds / menu.seconds[:, :1]).mean(axis=0)
        for size, time in zip(menu.sizes, relative.tolist(), strict=True):
            rows, pseudo_rows = measured.requests * (size.tree_rows - 1), measured.requests * sum(size.pseudo_rows)
            if rows or pseudo_rows:
                self._correct(_features(rows, pseudo_rows), time)

    def _correct(self, features: FloatArray, time: float) -> None:
        """Take note of the time of a pass, in plain ones."""
        towards = self._doubt @ features
        gain = towards / (features @ towards + NOISE**2)
        self._costs = np.maximum(self._costs + gain * (time - 1.0 - features @ self._costs), 0.0)
        self._doubt -= np.outer(gain, towards)


def _features(rows: int, pseudo_rows: int) -> FloatArray:
    return np.array([float(rows + pseudo_rows > 0), float(rows), float(pseudo_rows)])
