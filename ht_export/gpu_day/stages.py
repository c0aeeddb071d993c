"""The stages of a day on a GPU, those that are worth the most first."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ht_export.gpu_day.settings import DaySettings

# The sections of a stage: names, and what finds each.
Sections = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


@dataclass(frozen=True)
class Stage:
    """A part, or the part of one, that has a process of its own. Seconds are those expected on a large GPU, and the
    most that it is given; with less than `least` it does not begin. `function` is imported where it runs.
    """

    name: str
    part: int
    title: str
    expected: int
    limit: int
    least: int
    module: str
    function: str

    def sections(self, settings: DaySettings) -> Sections:
        """Return its sections."""
        found: Sections = getattr(importlib.import_module(self.module), self.function)(settings)
        return found


HERE = "ht_export.gpu_day"
PARTS = {1: "kernel", 2: "plans", 3: "step time", 4: "end to end", 5: "training"}
# The kernel and the time of a step first: nothing else here tells what a GPU is worth to this way of decoding, and both
# need nothing that is carried. Then what goes on being of use when the machine is gone: weights. Then what may be
# refused (a library, a plan), and at last what makes the first tables longer.
STAGES = (
    Stage("kernel", 1, "bandwidth, the goal's shapes, 400 cases of the grid", 75, 180, 30, f"{HERE}.kernel", "first"),
    Stage(
        "step-time", 3, "7B shape in both types, SmolLM2 in fp16, the host", 100, 210, 40, f"{HERE}.step_time", "first"
    ),
    Stage(
        "training",
        5,
        "a fit to carried text, measured on dev prompts",
        240,
        420,
        60,
        f"{HERE}.training",
        "fit_sections",
    ),
    Stage(
        "export",
        2,
        "the engine that plans and texts are compared with",
        60,
        180,
        40,
        f"{HERE}.plans",
        "export_sections",
    ),
    Stage(
        "reference",
        2,
        "the PyTorch reference with the kernel in CUDA graphs",
        90,
        180,
        40,
        f"{HERE}.plans",
        "reference",
    ),
    Stage(
        "end-to-end",
        4,
        "1, 4 and 16 clients, plain and speculative, tuned",
        120,
        240,
        60,
        f"{HERE}.end_to_end",
        "sections",
    ),
    Stage(
        "plans",
        2,
        "plans of TensorRT for RTX and TensorRT, ONNX Runtime",
        120,
        300,
        40,
        f"{HERE}.plans",
        "plan_sections",
    ),
    Stage("step-time-more", 3, "1B shape, SmolLM2 in bf16", 70, 150, 40, f"{HERE}.step_time", "more"),
    Stage("kernel-more", 1, "the whole grid, all shapes that are timed", 200, 420, 40, f"{HERE}.kernel", "more"),
    Stage("answers", 5, "text of all train prompts, made here", 200, 420, 60, f"{HERE}.training", "answer_sections"),
    Stage("sweep", 5, "placements and numbers of draft steps", 180, 300, 60, f"{HERE}.training", "sweep_sections"),
)


def chosen(only: str | None) -> list[Stage]:
    """Return the stages that `only` names: parts by number, stages by name, with commas; None for all. Raises
    `ValueError` for a name that there is not.
    """
    if only is None:
        return list(STAGES)
    names = {name.strip() for name in only.split(",")}
    found = [stage for stage in STAGES if stage.name in names or str(stage.part) in names]
    known = {stage.name for stage in STAGES} | {str(part) for part in PARTS}
    if odd := sorted(names - known):
        parts = ", ".join(f"{number} ({title})" for number, title in PARTS.items())
        raise ValueError(f"{odd[0]!r} is no part: {parts}; and no stage: {', '.join(stage.name for stage in STAGES)}")
    return found
