"""How long a fit is: its steps from a time to spend, by this machine's measured pace."""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import torch
from rich.progress import Progress

from ht_export.model.checkpoint import BaseModel
from ht_export.model.transfer import TransferLayers
from ht_export.training.data import AnsweredPrompt
from ht_export.training.evaluate import evaluate
from ht_export.training.fit import fit
from ht_export.training.recipe.record import Pace
from ht_export.training.settings import FitSettings

# Steps that are timed; one more comes before them. Beyond so many seconds one is enough.
TIMED = 4
LONGEST_TIMING = 60.0
# With less nothing is learned; and beyond so many passes over the texts they are learned by heart.
LEAST_STEPS = 20
MOST_PASSES = 30
MEASUREMENTS = 10
# Seconds of work that are lost at most where a fit is killed; and steps between checkpoints at most.
CHECKPOINT_SECONDS = 120.0
CHECKPOINT_STEPS = 50


def seconds_per_step(
    base: BaseModel,
    data: Sequence[AnsweredPrompt],
    held_out: Sequence[AnsweredPrompt],
    settings: FitSettings,
    progress: Progress,
) -> tuple[float, float]:
    """Return the seconds of an optimizer step, the median of some, and of a measurement on `held_out`."""
    clock = _Clock()
    short = replace(settings, steps=TIMED + 1, schedule="constant", init="identity")
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_EnoughError):
        fit(
            base,
            data,
            short,
            Path(folder) / "timing",
            progress,
            checkpoint_every=TIMED + 1,
            log=clock,
            report=lambda _: None,
        )
    head = None if settings.head_size is None else torch.arange(settings.head_size)
    transfer = TransferLayers(settings.layers, base.model.config.hidden_size, settings.correction_rank, head)
    begun = perf_counter()
    evaluate(base, transfer.to(base.model.device), held_out)
    return clock.seconds(), perf_counter() - begun


def pace_for(seconds: float, step: float, measurement: float, texts: int, texts_of_a_step: int) -> Pace:
    """Return the length of a fit that takes `seconds` where a step takes `step` and a measurement `measurement`."""
    most = math.ceil(MOST_PASSES * texts / texts_of_a_step)
    steps = int((seconds - (MEASUREMENTS + 1) * measurement) / step)
    return pace_of(max(LEAST_STEPS, min(steps, most)), step)


def pace_of(steps: int, step: float | None = None) -> Pace:
    """Return the pace of a fit of so many steps, each of which takes so many seconds."""
    often = CHECKPOINT_STEPS if step is None else int(CHECKPOINT_SECONDS / max(step, 1e-9))
    return Pace(steps, math.ceil(steps / MEASUREMENTS), min(CHECKPOINT_STEPS, max(1, often)), step)


class _EnoughError(Exception):
    """Ends a fit of which enough was timed."""


class _Clock:
    """Takes the place of a log, to see when each step ends."""

    def __init__(self) -> None:
        self.ends: dict[int, float] = {}
        self._begun = perf_counter()

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """See `MetricLog`."""
        self.ends.setdefault(global_step, perf_counter())
        if len(self.ends) > 1 and perf_counter() - self._begun > LONGEST_TIMING:
            raise _EnoughError

    def seconds(self) -> float:
        """Return the median time from one step to the next."""
        ends = [self.ends[step] for step in sorted(self.ends)]
        return statistics.median(later - earlier for earlier, later in pairwise(ends))
