"""The course of a fit, from the TensorBoard log that it wrote."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from ht_export.foreign import foreign_code

Points = list[tuple[int, float]]


@dataclass
class History:
    """Numbers by optimizer step: the training loss of each draft step, and what was measured on held-out text: top-n by
    draft step and n, tokens per step by tree rows. All are empty where nothing was logged.
    """

    loss: dict[str, Points] = field(default_factory=dict)
    top: dict[str, dict[str, Points]] = field(default_factory=dict)
    tokens_per_step: dict[str, Points] = field(default_factory=dict)


def read_history(folder: Path) -> History:
    """Return what the log in `folder` says, nothing where there is none. A fit that was killed logs some steps
    twice: the later ones count. Raises `InputError` for a damaged log.
    """
    history = History()
    if not folder.is_dir():
        return history
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with foreign_code(f"cannot read the log in {folder}", "delete it: the report goes without"):
        # All of them, where it would keep a sample.
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        found = {
            tag: sorted({event.step: float(event.value) for event in events.Scalars(tag)}.items())
            for tag in events.Tags()["scalars"]
        }
    for tag in sorted(found):
        if match := re.fullmatch(r"loss/step_(\d+)", tag):
            history.loss[f"step {match[1]}"] = found[tag]
        elif match := re.fullmatch(r"held_out/step_(\d+)_top_(\d+)", tag):
            history.top.setdefault(f"step {match[1]}", {})[match[2]] = found[tag]
        elif match := re.fullmatch(r"held_out/tokens_per_step_(\d+)_rows", tag):
            history.tokens_per_step[match[1]] = found[tag]
    return history
