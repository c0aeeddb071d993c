"""Checkpoints of a fit: everything that the next step depends on, in one safetensors file written atomically."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ht_export.tensors import write_safetensors
from ht_export.transfer import TransferLayers
from runtime.errors import InputError

METADATA_KEY = "fit"


@dataclass
class FitState:
    """A fit after `step` optimizer steps.

    `best` holds the weights with the lowest held-out loss so far, `best_loss`, of step `best_step`; it is empty while
    nothing was measured.
    """

    transfer: TransferLayers
    optimizer: torch.optim.Optimizer
    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = float("inf")
    best_step: int = 0

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
    about = {"step": state.step, "best_loss": state.best_loss, "best_step": state.best_step, "run": run}
    write_safetensors(path, tensors, {METADATA_KEY: json.dumps(about)})


def load_checkpoint(path: Path, state: FitState, run: dict[str, Any]) -> None:
    """Restore `state` from `path`. Raises `InputError` when that is not a checkpoint, or one of another run."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a checkpoint of ht-train fit ({error}); delete it to start again") from error
    differing = [key for key, value in json.loads(json.dumps(run)).items() if about["run"].get(key) != value]
    if differing:
        raise InputError(
            f"{path} is the checkpoint of a run with another {differing[0]} ({about['run'].get(differing[0])!r}, "
            f"now {run[differing[0]]!r}); repeat that, name another --checkpoint, or delete it to start again"
        )
    try:
        _restore(state, about, tensors)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it to start again") from error


def _restore(state: FitState, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    groups: dict[str, dict[str, Tensor]] = {"weight": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = tensor
    state.transfer.load_state_dict(groups["weight"])
    state.best = groups["best"]
    state.step, state.best_loss, state.best_step = about["step"], about["best_loss"], about["best_step"]
    for name, tensor in groups["optimizer"].items():
        parameter_name, _, key = name.rpartition("/")
        parameter = state.transfer.get_parameter(parameter_name)
        # AdamW counts its steps in a tensor on the CPU.
        state.optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)
