"""The stages from the base model to the engine, each compared with the one before it or with the PyTorch reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ht_export.verify.passes import Expected, relative
from ht_export.verify.traces import Trace, Tracer

# Tolerances, relative to the largest value: float32 sums of a few thousand terms in
# another order; rounding of every operation to half precision. Engines with
# quantised weights need only be nearer than nothing at all.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1.5e-1, "int8": 1.0, "int4": 1.0, "fp8": 1.0}
# Values computed within a layer, in order.
OF_A_LAYER = ("keys", "values", "attention")
# Likely causes where they are the first to be wrong.
MEANING = {
    "keys": "its norms, its key projection or the rotary embedding",
    "values": "its norms or its value projection",
    "attention": "the mask, the cache, the scale or the queries",
}


@dataclass(frozen=True)
class Deviation:
    """The deviation of one output of a pass: the largest and the mean absolute difference, and the largest one relative
    to the output's largest value. `layer` is None for what comes after all layers.
    """

    case: str
    output: str
    layer: int | None
    largest: float
    mean: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """One comparison; `skipped` says why there is none."""

    name: str
    against: str
    tolerance: float
    deviations: list[Deviation] = field(default_factory=list)
    skipped: str | None = None

    @property
    def worst(self) -> Deviation | None:
        """The largest relative deviation."""
        return max(self.deviations, key=lambda one: one.relative, default=None)

    @property
    def wrong(self) -> Deviation | None:
        """The first output, in the order of computation, that differs by more than is allowed.

        All that is computed from it differs too, so that this is where to look.
        """
        beyond = [one for one in self.deviations if not one.relative <= self.tolerance]
        return min(beyond, key=_order, default=None)

    def output(self, name: str) -> list[Deviation]:
        """Return the deviations of one output."""
        return [one for one in self.deviations if one.output == name]


def compare_passes(
    name: str, against: str, tolerance: float, tracer: Tracer, expected: Sequence[tuple[Expected, Trace]]
) -> Comparison:
    """Run the tracer over passes whose traces are known; every pass begins with the cache of that trace, so that
    nothing adds up.
    """
    deviations = [
        deviation
        for one, trace in expected
        for deviation in compare_traces(one.case, tracer.run(one.rows, one.cache), trace)
    ]
    return Comparison(name, against, tolerance, deviations)


def compare_traces(case: str, found: Trace, expected: Trace) -> Iterator[Deviation]:
    """Yield how each output of one pass differs; what only one of the two tells is passed over."""
    layers = {
        "keys": (found.outputs.key_new, expected.outputs.key_new),
        "values": (found.outputs.value_new, expected.outputs.value_new),
        "attention": (found.attention, expected.attention),
    }
    for output, (ours, theirs) in layers.items():
        if ours and theirs:
            for layer, (mine, wanted) in enumerate(zip(ours, theirs, strict=True)):
                yield _deviation(case, output, layer, mine, wanted)
    for output in ("logits", "draft_logits"):
        mine, wanted = getattr(found.outputs, output), getattr(expected.outputs, output)
        if len(wanted):
            yield _deviation(case, output, None, mine, wanted)


def place(deviation: Deviation) -> str:
    """Return where a deviation is, in words."""
    if deviation.layer is None:
        return deviation.output.replace("_", " ")
    return f"layer {deviation.layer}, {deviation.output}"


def _deviation(case: str, output: str, layer: int | None, found: NDArray, expected: NDArray) -> Deviation:
    found, expected = found.astype(np.float32), expected.astype(np.float32)
    difference = np.abs(found - expected)
    largest, mean = (float(reduce(difference)) if difference.size else 0.0 for reduce in (np.max, np.mean))
    return Deviation(case, output, layer, largest, mean, relative(found, expected))


def _order(deviation: Deviation) -> tuple[int, int]:
    if deviation.layer is None:
        return (1 << 30, 0)
    return (deviation.layer, OF_A_LAYER.index(deviation.output))
