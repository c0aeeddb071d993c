"""Checkpoints of a fit: everything that the next step depends on, in one safetensors file written atomically."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ht_export.model.tensors import write_safetensors
from ht_export.model.transfer import TransferLayers
from ht_export.training.identity import first_difference
from runtime.errors import InputError

METADATA_KEY = "fit"
OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")
COUNTS = {"step": int, "best_loss": float, "best_step": int, "anchors": int, "seconds": float, "peak_memory": int}


@dataclass
class FitState:
    """A fit after `step` optimizer steps.

    `best` holds the weights with the lowest held-out loss so far, `best_loss`, of step `best_step`; it is empty while
    nothing was measured. `anchors` were trained on in `seconds`,
    with `peak_memory` bytes at most.
    """

    transfer: TransferLayers
    optimizer: torch.optim.Optimizer
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
    for name, parameter in state.transfer.named_parameters():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in state.optimizer.state[parameter].items()}
    about = {**{name: getattr(state, name) for name in COUNTS}, "run": run}
    write_safetensors(path, tensors, {METADATA_KEY: json.dumps(about)})


def load_checkpoint(path: Path, state: FitState, run: dict[str, Any]) -> None:
    """Restore `state` from `path`. Raises `InputError` when that is not a checkpoint, or one of another run."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        made_by = dict(about["run"])
        differing = first_difference(run, made_by)
        if differing is None:
            _restore(state, about, tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{path} is not a whole checkpoint of ht-train fit ({error}); delete it to start again"
        ) from error
    if differing is not None:
        raise InputError(
            f"{path} is the checkpoint of a run with another {differing} ({made_by.get(differing)!r}, now "
            f"{run[differing]!r}); repeat that, name another --checkpoint, or delete it to start again"
        )


def _restore(state: FitState, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    groups: dict[str, dict[str, Tensor]] = {"weight": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = tensor
    counts = {name: kind(about[name]) for name, kind in COUNTS.items()}
    state.transfer.load_state_dict(groups["weight"])
    state.best = groups["best"]
    for name, value in counts.items():
        setattr(state, name, value)
    for name, parameter in state.transfer.named_parameters():
        for key in OPTIMIZER_KEYS if state.step else ():
            tensor = groups["optimizer"][f"{name}/{key}"]
            # AdamW counts its steps in a tensor on the CPU.
            state.optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)
