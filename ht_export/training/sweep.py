"""Where transfer layers belong, and how many draft steps pay: short fits, of which the better half goes on.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): every placement is trained for a few steps, the better
half of them for twice as many, and so on. All train at a constant learning rate, so that a fit can be made longer; the
accuracies are those of short fits and rank placements, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta
from rich.progress import Progress

from ht_export.formats import PythonJsonFormat
from ht_export.model.checkpoint import BaseModel
from ht_export.model.transfer import TransferLayers
from ht_export.training.cost import RowCosts, best_choice
from ht_export.training.data import AnsweredPrompt, fingerprint
from ht_export.training.evaluate import predict, statistics
from ht_export.training.features import FeatureCache
from ht_export.training.fit import fit
from ht_export.training.identity import first_difference
from ht_export.training.settings import FitSettings, compared
from runtime.errors import InputError
from runtime.files import write_json

RESULTS = "sweep.json"
# Shares of the depth: shared layers, and layers that differ by step; 1 is Medusa's place.
SHARED = (1 / 3, 1 / 2, 2 / 3, 5 / 6, 1)
STAGGERED = ((2 / 3, 1 / 2, 1 / 3), (5 / 6, 3 / 4, 2 / 3))

Placement = tuple[int, ...]

Count = Annotated[int, Meta(ge=0, le=1 << 31)]
Share = Annotated[float, Meta(ge=0, le=1)]
# Below any infinite one.
Positive = Annotated[float, Meta(ge=0, le=1e300)]


class RowSizes(TypedDict):
    """Row counts of a tree."""

    tree_rows: Count
    pseudo_rows: Annotated[list[Count], Meta(min_length=1)]


class SweepRow(TypedDict):
    """What was measured of a placement after so many steps; see `sweep`."""

    name: str
    layers: Annotated[list[Count], Meta(min_length=1)]
    steps: Count
    top1: list[Share]
    top8: list[Share]
    sizes: RowSizes
    tokens_per_step: Positive
    cost: Positive
    speedup: Positive
    finalist: NotRequired[bool]


@dataclass(frozen=True)
class _Sweep:
    """The results of a sweep so far, by placement and step, and what it was made from."""

    results: dict[str, Annotated[dict[str, SweepRow], Meta(min_length=1)]]
    placements: Any = None
    steps: Any = None
    rungs: Any = None
    dtype: Any = None
    fit: Any = None
    base_model: Any = None
    data_sha256: Any = None
    row_cost: Any = None


SWEEPS = PythonJsonFormat("file of sweep results", 1 << 26, "delete its folder and sweep again", kind=_Sweep)


@dataclass(frozen=True)
class SweepSettings:
    """`placements` to compare, training `steps` of the finalists, number of `rungs`, cost of a row (see `RowCosts`)."""

    placements: tuple[Placement, ...]
    steps: int = 200
    rungs: int = 3
    row_cost: float = 0.05

    def __post_init__(self) -> None:
        # So many bits: at least 2 to the power of one less, which for a hostile number of rungs has no room anywhere.
        if self.rungs < 1 or self.steps.bit_length() < self.rungs:
            raise InputError(
                f"rungs must be at least 1 and steps at least 2 to the power of rungs - 1; "
                f"not {self.rungs} rungs and {self.steps} steps"
            )
        if not self.placements:
            raise InputError("a sweep needs at least one placement")

    def rung_steps(self) -> list[int]:
        """Return the training steps that a placement has behind it at the end of each rung."""
        return [self.steps // 2 ** (self.rungs - 1 - rung) for rung in range(self.rungs)]


def default_placements(num_layers: int, num_steps: int) -> tuple[Placement, ...]:
    """Return placements that span the depth: one layer for all steps, and a layer for each step."""
    placements = [(round(num_layers * share),) * num_steps for share in SHARED]
    for shares in STAGGERED:
        extended = (*shares, *(shares[-1],) * num_steps)
        placements.append(tuple(round(num_layers * share) for share in extended[:num_steps]))
    return tuple(dict.fromkeys(placements))


def sweep(
    base: BaseModel,
    data: Sequence[AnsweredPrompt],
    held_out: Sequence[AnsweredPrompt],
    fit_settings: FitSettings,
    settings: SweepSettings,
    folder: Path,
    progress: Progress,
    feature_cache: Path | None = None,
    report: Callable[[str], None] = print,
) -> list[SweepRow]:
    """Compare placements and return a row for each, the best first; `folder` keeps checkpoints and results.

    Killed at any point, the same call continues. A row has name, layers, steps, finalist, top1 and top8 by draft step,
    and for the best row counts at this row cost: sizes, tokens_per_step, cost, speedup. Raises `InputError`.
    """
    costs = RowCosts.of(base, settings.row_cost, fit_settings.draft_size)
    fits = {
        layers: replace(fit_settings, layers=layers, steps=settings.steps, schedule="constant", patience=0)
        for layers in settings.placements
    }
    for layers in fits:
        TransferLayers(layers, base.model.config.hidden_size).check_layers(base.model.config.num_hidden_layers)
    about = {
        "placements": settings.placements,
        "steps": settings.steps,
        "rungs": settings.rungs,
        "dtype": str(base.model.dtype),
        "fit": _common(fit_settings),
        "base_model": base.identity(),
        "data_sha256": fingerprint([*data, *held_out]),
        "row_cost": settings.row_cost,
    }
    measured = _read_results(folder / RESULTS, about)
    if feature_cache is not None:
        # Made here for all placements; each fit takes its own part.
        every_layer = sorted({layer for placement in settings.placements for layer in placement})
        FeatureCache(feature_cache, base, every_layer, data, progress)
    alive = list(fits)
    bar = progress.add_task("placements", total=_fits(len(alive), settings.rungs))
    for rung, steps in enumerate(settings.rung_steps()):
        for layers in alive:
            name = _name(layers)
            at_rung = measured.setdefault(name, {})
            # A resumed sweep ranks by what was measured at the rung, not by what came after.
            if str(steps) not in at_rung:
                transfer, _ = fit(
                    base,
                    data,
                    replace(fits[layers], steps=steps),
                    folder / f"{name}.checkpoint",
                    progress,
                    feature_cache=feature_cache,
                    report=lambda _: None,
                )
                texts = list(predict(base, transfer, held_out))
                choice = best_choice(texts, layers, costs)
                found = statistics(texts)
                at_rung[str(steps)] = {
                    "name": name,
                    "layers": list(layers),
                    "steps": steps,
                    "top1": found["top"]["1"],
                    "top8": found["top"]["8"],
                    "sizes": {
                        "tree_rows": choice.sizes.tree_rows,
                        "pseudo_rows": list(choice.sizes.pseudo_rows),
                    },
                    "tokens_per_step": round(choice.tokens_per_step, 4),
                    "cost": round(choice.cost, 4),
                    "speedup": round(choice.speedup, 4),
                }
                write_json(folder / RESULTS, {**about, "results": measured})
                report(f"{name} after {steps} steps: {_summary(at_rung[str(steps)])}")
            for task in progress.task_ids:
                if task != bar:
                    progress.remove_task(task)
            progress.advance(bar)
        if rung + 1 < settings.rungs:
            speedups = {layers: measured[_name(layers)][str(steps)]["speedup"] for layers in alive}
            alive = sorted(alive, key=lambda layers: -speedups[layers])[: max(1, (len(alive) + 1) // 2)]
    finalists = {_name(layers) for layers in alive}
    last = {name: max(at_rung.values(), key=lambda row: row["steps"]) for name, at_rung in measured.items()}
    rows: list[SweepRow] = [{**row, "finalist": name in finalists} for name, row in last.items()]
    return sorted(rows, key=lambda row: (not row["finalist"], -row["speedup"]))


def table(rows: Sequence[SweepRow]) -> str:
    """Return the rows of a sweep as a Markdown table."""
    lines = [
        "| layers | trained | top-1 by step | top-8 | tree rows | pseudo rows | tokens per step | cost | speed-up |",
        "| --- | ---: | --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        layers = ",".join(map(str, row["layers"]))
        shown = f"**{layers}**" if row is rows[0] else layers
        top1, top8 = (" ".join(f"{share:.2f}" for share in row[key]) for key in ("top1", "top8"))
        pseudo = ",".join(map(str, row["sizes"]["pseudo_rows"]))
        lines.append(
            f"| {shown} | {row['steps']} | {top1} | {top8} | {row['sizes']['tree_rows']} | {pseudo} | "
            f"{row['tokens_per_step']:.2f} | {row['cost']:.2f} | {row['speedup']:.2f} |"
        )
    return "\n".join(lines)


def recommendation(rows: Sequence[SweepRow], row_cost: float) -> str:
    """Return one sentence with the best placement, its draft steps and row counts."""
    best = rows[0]
    used = sum(1 for count in best["sizes"]["pseudo_rows"] if count)
    if not used:
        return f"at {row_cost} plain passes a row nothing is faster than plain decoding"
    layers = ",".join(map(str, best["layers"][:used]))
    return (
        f"at {row_cost} plain passes a row: --layers {layers}, {best['sizes']['tree_rows']} tree rows, "
        f"{best['sizes']['pseudo_rows'][0]} pseudo rows a step: {best['tokens_per_step']:.2f} tokens per step at "
        f"{best['cost']:.2f} plain passes"
    )


def _common(settings: FitSettings) -> dict[str, Any]:
    """Return what all fits have in common."""
    return {name: value for name, value in compared(settings).items() if name not in ("layers", "steps")}


def _name(layers: Placement) -> str:
    return "-".join(map(str, layers))


def _fits(count: int, rungs: int) -> int:
    total = 0
    for _ in range(rungs):
        total += count
        count = max(1, (count + 1) // 2)
    return total


def _summary(row: SweepRow) -> str:
    top1 = "/".join(f"{share:.2f}" for share in row["top1"])
    return f"top-1 {top1}, {row['tokens_per_step']:.2f} tokens per step, speed-up {row['speedup']:.2f}"


def _read_results(path: Path, about: dict[str, Any]) -> dict[str, dict[str, SweepRow]]:
    if not path.is_file():
        return {}
    found = SWEEPS.read(path)
    if differing := first_difference(about, asdict(found)):
        raise InputError(
            f"{path.parent} holds a sweep with another {differing}; choose a new --out, or repeat those settings"
        )
    return found.results
