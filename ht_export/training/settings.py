"""The settings of a fit of transfer layers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from ht_export.model.transfer import DRAFTERS, Drafter
from ht_export.training.losses import Objective
from ht_export.training.optimizers import OPTIMIZERS
from runtime.checks import MOST_REPEATS
from runtime.errors import InputError

INITIALISATIONS = ("ridge", "identity", "file")
SCHEDULES = ("cosine", "constant")
# More is a mistyped number: a step would not end, float32 overflow, or no memory hold it.
MOST = {"accumulate": MOST_REPEATS, "learning_rate": 1000, "correction_rank": 2**16}
# Settings that checkpoints of earlier releases do not say.
LATER = ("drafter", "loss_choice", "optimizer")


@dataclass(frozen=True)
class FitSettings:
    """Options of a fit of transfer layers. Runs with equal ones, data and precision give equal weights on a CPU.

    A step takes `accumulate` batches of `sequences` texts with `anchors` anchors each, whatever the number of
    processes. `init` "file" begins with transfer layers trained before; steps that those lack begin by ridge
    regression. `patience` is how many held-out measurements
    in a row may bring nothing before the fit stops; 0 never stops it. With a `draft_size` drafts are chosen from so
    many tokens, those that the data has most of; None takes those of the start, or the whole vocabulary. With a
    `loss_size` the loss runs over so many tokens, and drafts are chosen from the whole vocabulary. `drafter`
    "medusa" trains Medusa heads by the same loss; they begin as the identity and have no token correction. The
    `optimizer` "muon" is Muon (torch's) for the maps, and AdamW for the rest.
    """

    layers: tuple[int, ...]
    steps: int = 500
    sequences: int = 8
    anchors: int = 64
    accumulate: int = 1
    init: str = "ridge"
    correction_rank: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    schedule: str = "cosine"
    final_learning_rate: float = 0.02
    max_gradient_norm: float = 1.0
    step_weights: tuple[float, ...] | None = None
    loss_temperature: float = 1.0
    loss_top_k: int = 0
    loss_choice: float = 0.0
    patience: int = 0
    seed: int = 0
    draft_size: int | None = None
    drafter: Drafter = "transfer"
    loss_size: int | None = None
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "anchors", "accumulate", "learning_rate", "max_gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be more than 0, not {getattr(self, name)}")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise InputError(f"{name} must be at most {most}, not {getattr(self, name)}")
        for name in ("correction_rank", "patience", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise InputError(f"{name} must be at least 0, not {getattr(self, name)}")
        choices = {"init": INITIALISATIONS, "schedule": SCHEDULES, "drafter": DRAFTERS, "optimizer": OPTIMIZERS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)}")
        if self.draft_size is not None and self.loss_size is not None:
            raise InputError(
                f"a draft head of {self.draft_size} tokens has the loss run over these alone; leave loss_size "
                f"{self.loss_size} out, or draft_size, to choose drafts from the whole vocabulary"
            )
        if self.drafter == "medusa" and self.init == "ridge":
            raise InputError("Medusa heads are no regression: they begin as the identity; leave --init ridge out")
        if self.step_weights is not None and len(self.step_weights) != len(self.layers):
            raise InputError(
                f"step_weights has {len(self.step_weights)} numbers for {len(self.layers)} draft steps; give one each"
            )
        _ = self.objective

    @property
    def head_size(self) -> int | None:
        """How many tokens the loss runs over; None for those of the start, or the whole vocabulary."""
        return self.draft_size if self.loss_size is None else self.loss_size

    @property
    def objective(self) -> Objective:
        """The loss that these settings ask for."""
        weights = self.step_weights or (1.0,) * len(self.layers)
        return Objective(weights, self.loss_temperature, self.loss_top_k, self.loss_choice)

    def rate(self, step: int) -> float:
        """Return the learning rate of `step` (from 0): linear warm-up, then constant or a cosine to a small share."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        low = self.final_learning_rate
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def compared(settings: FitSettings) -> dict[str, Any]:
    """Return the settings by which a run is told from another: None for what nobody asks for of those that files of
    earlier releases do not say.
    """
    unsaid = [one.name for one in fields(settings) if one.name in LATER and getattr(settings, one.name) == one.default]
    return asdict(settings) | dict.fromkeys(unsaid)
