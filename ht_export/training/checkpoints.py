"""Checkpoints of a fit: everything that the next step depends on, in one safetensors file written atomically."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor, nn

from ht_export.formats import PythonJsonFormat
from ht_export.model.tensors import opened_tensors, shapes, write_safetensors
from ht_export.model.transfer import TransferLayers
from ht_export.training.identity import first_difference
from ht_export.training.optimizers import COUNT, KEPT
from runtime.errors import InputError, shown
from runtime.formats import Format

METADATA_KEY = "fit"
# Far above any fit's.
MOST = 1 << 60

Count = Annotated[int, Meta(ge=0, le=MOST)]
Seconds = Annotated[float, Meta(ge=0, le=float(MOST))]


@dataclass(frozen=True)
class _Counts:
    """A fit's numbers; see `FitState`."""

    step: Count
    best_loss: Annotated[float, Meta(ge=-float(MOST))]
    best_step: Count
    anchors: Count
    seconds: Seconds
    peak_memory: Count


@dataclass(frozen=True)
class _About(_Counts):
    """What a checkpoint says besides its tensors; `run` is what a resumed run must share with it."""

    run: dict[str, Any]


DESCRIPTIONS = PythonJsonFormat("whole checkpoint of ht-train fit", 1 << 24, "delete it to start again", kind=_About)
CHECKPOINTS = Format("safetensors file of ht-train fit", 1 << 24, "delete it to start again")


@dataclass
class FitState:
    """A fit after `step` optimizer steps.

    Each of the `optimizers` has parameters of its own. `best` holds the weights with the lowest held-out loss so far,
    `best_loss`, of step `best_step`; it is empty while nothing was measured. `anchors` were trained on in `seconds`,
    with `peak_memory` bytes at most.
    """

    transfer: TransferLayers
    optimizers: tuple[torch.optim.Optimizer, ...]
    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = float("inf")
    best_step: int = 0
    anchors: int = 0
    seconds: float = 0.0
    peak_memory: int = 0

    def note(self, loss: float) -> None:
        """Remember the present weights when their held-out loss is the lowest so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self.best = {name: tensor.detach().clone() for name, tensor in self.transfer.state_dict().items()}


def save_checkpoint(path: Path, state: FitState, run: dict[str, Any]) -> None:
    """Write `state`; `run` is what a resumed run must share with this one."""
    tensors = {f"weight/{name}": tensor for name, tensor in state.transfer.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in state.best.items()}
    for name, parameter, optimizer in _optimized(state):
        tensors |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    about = {**{count.name: getattr(state, count.name) for count in fields(_Counts)}, "run": run}
    write_safetensors(path, tensors, {METADATA_KEY: json.dumps(about)})


def load_checkpoint(path: Path, state: FitState, run: dict[str, Any]) -> None:
    """Restore `state` from `path`. Raises `InputError` when that is not a checkpoint, or one of another run."""
    with opened_tensors(path, CHECKPOINTS) as file:
        about = DESCRIPTIONS.decode((file.metadata() or {}).get(METADATA_KEY, ""), path)
        differing = first_difference(run, about.run)
        if differing is not None:
            raise InputError(
                f"{path} is the checkpoint of a run with another {differing} ({shown(about.run.get(differing))}, now "
                f"{shown(run.get(differing))}); repeat that, name another --checkpoint, or delete it to start again"
            )
        found = shapes(file)
        expected = _expected(state, about.step, any(name.startswith("best/") for name in found))
        for name, shape in expected.items():
            if found.get(name) != shape:
                told = f"of shape {list(found[name])}" if name in found else "missing"
                raise CHECKPOINTS.unfit(path, f"{name} is {told}, and must be of shape {list(shape)}")
        tensors = {name: file.get_tensor(name) for name in expected}
    _restore(state, about, tensors)


def _expected(state: FitState, step: int, best: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors after `step` steps, with those of the `best` weights or without."""
    weights = {name: tuple(tensor.shape) for name, tensor in state.transfer.state_dict().items()}
    expected = {f"weight/{name}": shape for name, shape in weights.items()}
    if best:
        expected |= {f"best/{name}": shape for name, shape in weights.items()}
    for name, parameter, optimizer in _optimized(state) if step else ():
        for key in KEPT[type(optimizer)]:
            expected[f"optimizer/{name}/{key}"] = () if key == COUNT else tuple(parameter.shape)
    return expected


def _optimized(state: FitState) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    """Yield each parameter with its name and its optimizer."""
    names = {parameter: name for name, parameter in state.transfer.named_parameters()}
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[parameter], parameter, optimizer


def _restore(state: FitState, about: _About, tensors: dict[str, Tensor]) -> None:
    groups: dict[str, dict[str, Tensor]] = {"weight": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = tensor
    state.transfer.load_state_dict(groups["weight"])
    state.best = groups["best"]
    for count in fields(_Counts):
        setattr(state, count.name, getattr(about, count.name))
    for name, parameter, optimizer in _optimized(state) if state.step else ():
        for key in KEPT[type(optimizer)]:
            tensor = groups["optimizer"][f"{name}/{key}"]
            # AdamW counts its steps in a tensor on the CPU.
            optimizer.state[parameter][key] = tensor if key == COUNT else tensor.to(parameter)
