"""Reliability of drafts' probabilities: the share of right drafts that was observed on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from runtime.arrays import FloatArray


class Reliability:
    """Maps a draft's probabilities to observed ones, by draft step; for greedy decoding, which is what was observed.

    `steps` has for each draft step bins of predicted probabilities, each with its mean `predicted`, `observed` and
    `count` (see `ht_export.training.evaluate`). Between bins it is linear; it never falls.
    """

    def __init__(self, steps: Sequence[Sequence[Mapping[str, float]]]) -> None:
        self._curves = [_curve(bins) for bins in steps]

    @classmethod
    def of(cls, acceptance: Mapping[str, Any]) -> Reliability | None:
        """Return the reliability in the statistics of a transfer-layers file, None if they have none.

        Raises `ValueError`, naming what is wrong, when they cannot have been observed.
        """
        if not isinstance(acceptance, Mapping):
            raise ValueError(f"acceptance ({acceptance!r})")
        steps = acceptance.get("calibration")
        if steps is None:
            return None
        try:
            found = [step["bins"] for step in steps]
            points = [[(one["predicted"], one["observed"]) for one in bins] for bins in found]
        except (KeyError, TypeError) as error:
            raise ValueError(f"calibration ({error})") from error
        for step, pairs in enumerate(points, start=1):
            for number in (number for pair in pairs for number in pair):
                if not isinstance(number, int | float) or not 0.0 <= number <= 1.0:
                    raise ValueError(f"calibration (step {step} has {number!r} where a share is expected)")
            if any(later[0] < earlier[0] for earlier, later in pairwise(pairs)):
                raise ValueError(f"calibration (the bins of step {step} do not ascend)")
        return cls(found)

    def __call__(self, step: int, probabilities: FloatArray) -> FloatArray:
        """Return what `probabilities` [N] of `step` (0-based) are worth."""
        if step >= len(self._curves):
            return probabilities
        predicted, observed = self._curves[step]
        return np.interp(probabilities, predicted, observed)


def _curve(bins: Sequence[Mapping[str, float]]) -> tuple[FloatArray, FloatArray]:
    if not bins:
        # Nothing was observed: probabilities are what they say.
        return np.array([0.0, 1.0]), np.array([0.0, 1.0])
    predicted = np.array([0.0, *(one["predicted"] for one in bins), 1.0])
    # Beyond the last bin nothing was seen: certainty is as far off as there.
    observed = np.array([0.0, *(one["observed"] for one in bins), bins[-1]["observed"]])
    return predicted, np.maximum.accumulate(observed)
