"""Foresight: how probably a candidate wins the race of the base model's draw, by its draft probability and its noise.

The noise of coming draws is known, the base model's distribution is not; what drafts say of it is off by more from step
to step. A candidate of draft probability q, as sampling at the request's temperature has it, which waits for w (see
`runtime.sampling.noise`), has the weight q**power * w**-trust, and all that are off the shortlist together
their probability ** power * rest. Weights by their sum are the probabilities: a logistic regression of three numbers,
fitted by draft step and temperature on text (`ht_export.training.foresight`) and kept with the transfer layers. Were
drafts exact, power and trust would be 1, and the least w / q would win for sure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import msgspec
import numpy as np

from runtime.arrays import FloatArray
from runtime.drafting.drafts import DraftStep

# Temperatures that it is fitted at: far more than are of use.
MOST_TEMPERATURES = 100
MOST_STEPS = 64
Exponent = Annotated[float, msgspec.Meta(ge=0.0, le=10.0)]


@dataclass(frozen=True)
class StepForesight:
    """The numbers of one draft step; see the module."""

    power: Exponent
    trust: Exponent
    rest: Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]

    def between(self, other: StepForesight, share: float) -> StepForesight:
        """Return what lies at this `share` of the way to `other`."""
        return StepForesight(*(a + (b - a) * share for a, b in zip(self._numbers, other._numbers, strict=True)))

    @property
    def _numbers(self) -> tuple[float, float, float]:
        return self.power, self.trust, self.rest


@dataclass(frozen=True)
class AtTemperature:
    """What was fitted at a `temperature`, by draft step."""

    temperature: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)]
    steps: Annotated[tuple[StepForesight, ...], msgspec.Meta(min_length=1, max_length=MOST_STEPS)]


# For transfer layers without foresight of their own: what shipped ones had at temperature 0.8.
USUAL = (
    StepForesight(0.87, 0.60, 21.0),
    StepForesight(0.75, 0.48, 28.0),
    StepForesight(0.70, 0.42, 30.0),
)


class Foresight:
    """Foresight at any temperature, from what was `fitted` at some, in rising order; without any, as it usually is."""

    def __init__(self, fitted: tuple[AtTemperature, ...] = ()) -> None:
        self._fitted = fitted

    @classmethod
    def of(cls, acceptance: Mapping[str, Any]) -> Foresight:
        """Return the foresight in the statistics of a transfer-layers file. Raises `ValueError`, saying what is wrong,
        when it cannot have been fitted.
        """
        try:
            found = msgspec.convert(acceptance.get("foresight", ()), _Fitted)
        except msgspec.ValidationError as error:
            raise ValueError(f"the foresight of drafts cannot be: {error}") from error
        if any(later.temperature <= earlier.temperature for earlier, later in pairwise(found)):
            raise ValueError("the foresight of drafts cannot be: its temperatures do not rise")
        return cls(found)

    def at(self, temperature: float) -> tuple[StepForesight, ...]:
        """Return the numbers of each draft step at a `temperature` above 0; later steps are as the last."""
        if not self._fitted:
            return USUAL
        above = next((n for n, one in enumerate(self._fitted) if one.temperature >= temperature), len(self._fitted))
        if above in (0, len(self._fitted)):
            return self._fitted[min(above, len(self._fitted) - 1)].steps
        low, high = self._fitted[above - 1], self._fitted[above]
        share = (temperature - low.temperature) / (high.temperature - low.temperature)
        return tuple(a.between(b, share) for a, b in zip(low.steps, high.steps, strict=False))


_Fitted = Annotated[tuple[AtTemperature, ...], msgspec.Meta(max_length=MOST_TEMPERATURES)]


def foreseen(step: DraftStep, waits: FloatArray, how: StepForesight, count: int) -> DraftStep:
    """Return the `count` candidates that most probably win the race of the base model's draw, with how probably.

    The step's probabilities are at the temperature of sampling; `waits` [N] are the candidates' own.
    """
    weights = step.probabilities**how.power * waits**-how.trust
    rest = max(0.0, 1.0 - float(step.probabilities.sum())) ** how.power * how.rest
    order = (-weights).argsort(kind="stable")[:count]
    return DraftStep(step.tokens[order], weights[order] / max(float(weights.sum()) + rest, np.finfo(float).tiny))
