"""Reliability of drafts' probabilities: the share of right drafts that was observed on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import msgspec
import numpy as np

from runtime.arrays import FloatArray

# Bins of a draft step: far more than are of use.
MOST_BINS = 1000
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


@dataclass(frozen=True)
class Bin:
    """Candidates of about the same predicted probability: its mean, and the share of them that were right."""

    predicted: Share
    observed: Share


@dataclass(frozen=True)
class StepBins:
    """The bins of a draft step, by `predicted`, or it raises `ValueError`."""

    bins: Annotated[tuple[Bin, ...], msgspec.Meta(max_length=MOST_BINS)]

    def __post_init__(self) -> None:
        if any(later.predicted < earlier.predicted for earlier, later in pairwise(self.bins)):
            raise ValueError("the bins do not ascend")


@dataclass(frozen=True)
class Acceptance:
    """The part of the statistics of transfer layers that decoding uses: see `ht_export.training.evaluate`."""

    calibration: tuple[StepBins, ...] | None = None


class Reliability:
    """Maps a draft's probabilities to observed ones, by draft step; for greedy decoding, which is what was observed.

    `steps` has for each draft step bins of predicted probabilities, each with its mean `predicted` and `observed`.
    Between bins it is linear; it never falls.
    """

    def __init__(self, steps: Sequence[Sequence[Mapping[str, float]]]) -> None:
        self._curves = [_curve(bins) for bins in steps]

    @classmethod
    def of(cls, acceptance: Mapping[str, Any]) -> Reliability | None:
        """Return the reliability in the statistics of a transfer-layers file, None if they have none.

        Raises `ValueError`, saying what is wrong, when they cannot have been observed.
        """
        try:
            steps = msgspec.convert(acceptance, Acceptance).calibration
        except msgspec.ValidationError as error:
            raise ValueError(f"the statistics of drafts cannot be: {error}") from error
        return None if steps is None else cls([[vars(one) for one in step.bins] for step in steps])

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
