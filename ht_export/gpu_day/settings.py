"""What every part of a day on a GPU is given."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

# Seconds before its end at which a part begins nothing more.
MARGIN = 5.0


class NotHereError(Exception):
    """What a part needs is not here, through no fault of what it measures; the message says what."""


class NotOnCpuError(Exception):
    """A rehearsal cannot do this; the message says what."""


@dataclass(frozen=True)
class DaySettings:
    """`work` keeps what is made on the machine, and `kit`, in it, what was carried there; `results` is what comes back.

    On `device` "cpu" all is done in small, to rehearse. `deadline` is when the part must have ended, by
    `time.monotonic`.
    """

    work: Path
    results: Path
    device: str
    model: str = "smollm2-135m"
    deadline: float = float("inf")
    seed: int = 0

    @property
    def rehearsal(self) -> bool:
        """Whether this is no measurement."""
        return self.device == "cpu"

    @property
    def kit(self) -> Path:
        """The folder of what was carried there."""
        return self.work / "kit"

    def seconds_left(self) -> float:
        """Return the seconds until the part must have ended, the margin taken off."""
        return self.deadline - time.monotonic() - MARGIN

    def in_time(self) -> bool:
        """Return whether something short may still begin."""
        return self.seconds_left() > 0

    def until(self, seconds: float) -> DaySettings:
        """Return the same for what may take so many seconds from now, and no longer than the part."""
        return replace(self, deadline=min(self.deadline, time.monotonic() + seconds + MARGIN))

    def on_gpu_only(self, what: str) -> None:
        """Raise `NotOnCpuError` on a CPU."""
        if self.device == "cpu":
            raise NotOnCpuError(what)
