"""Fitting transfer layers: KL to the frozen base model's distribution at random anchors of its own text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from ht_export.attention import use_attention_rows
from ht_export.checkpoint import BaseModel
from ht_export.families import decoder_parts
from ht_export.training.batches import AnchorBatch, BatchSampler
from ht_export.training.data import Sequence
from ht_export.training.drafts import draft_hidden, run_context
from ht_export.training.evaluate import evaluate
from ht_export.transfer import TransferLayers
from runtime.errors import InputError
from runtime.files import atomic_path


@dataclass(frozen=True)
class FitSettings:
    """How transfer layers are fitted; two runs with equal settings, data and precision give equal weights on a CPU."""

    layers: tuple[int, ...]
    steps: int = 500
    sequences: int = 8
    anchors: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    final_learning_rate: float = 0.02
    max_gradient_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "anchors", "learning_rate", "max_gradient_norm"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be more than 0, not {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """Return the learning rate of `step` (from 0): linear warm-up, then a cosine to a share of the peak."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        low = self.final_learning_rate
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def fit(
    base: BaseModel,
    data: SequenceOf[Sequence],
    settings: FitSettings,
    checkpoint: Path,
    progress: Progress,
    *,
    held_out: SequenceOf[Sequence] = (),
    evaluate_every: int = 100,
    checkpoint_every: int = 50,
    report: Callable[[str], None] = print,
) -> TransferLayers:
    """Train transfer layers for `base` on `data`, continuing from `checkpoint` when that exists.

    `held_out` is measured every `evaluate_every` steps for the display only; it does not steer the training.
    """
    use_attention_rows(base.model)
    transfer = TransferLayers(settings.layers, base.model.config.hidden_size)
    transfer.check_layers(base.model.config.num_hidden_layers)
    optimizer = torch.optim.AdamW(transfer.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    fingerprint = {"settings": asdict(settings), "base": base.weights_sha256, "sequences": len(data)}
    first = _load_checkpoint(checkpoint, transfer, optimizer, fingerprint)
    if first:
        report(f"continuing at step {first} from {checkpoint}")
    sampler = BatchSampler(data, settings.sequences, settings.anchors, transfer.num_steps, settings.seed)
    bar = progress.add_task("fitting", total=settings.steps, completed=first)
    shown = ""
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        losses = draft_losses(base, transfer, sampler.batch(step))
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(transfer.parameters(), settings.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % checkpoint_every == 0 or done == settings.steps:
            _save_checkpoint(checkpoint, transfer, optimizer, done, fingerprint)
        if held_out and (done % evaluate_every == 0 or done == settings.steps):
            top = evaluate(base, transfer, held_out)["top"]
            by_step = zip(*(top[str(n)] for n in (1, 2, 4, 8)), strict=True)
            shown = "  held-out top-1/2/4/8 " + ", ".join("/".join(f"{v:.2f}" for v in values) for values in by_step)
            report(f"step {done}: loss {_show(losses)}{shown}")
        progress.update(bar, completed=done, description=f"fitting  loss {_show(losses)}{shown}")
    return transfer


def draft_losses(base: BaseModel, transfer: TransferLayers, batch: AnchorBatch) -> Tensor:
    """Return the mean KL(base || draft) of each step, [K], in nats."""
    parts = decoder_parts(base.model)
    num_layers = len(parts.layers)
    context = run_context(base.model, transfer, batch.input_ids)
    used = batch.weights > 0
    with torch.no_grad():
        steps = torch.arange(1, transfer.num_steps + 1)
        targets = batch.anchors[..., None] + steps
        length = batch.input_ids.shape[1]
        flat = (targets + length * torch.arange(len(targets))[:, None, None])[used]
        # Neighbouring anchors share target positions: the base model's head runs once for each.
        positions, index = torch.unique(flat, return_inverse=True)
        rows = context.hidden[num_layers].flatten(0, 1)[positions]
        base_probability = parts.head(parts.norm(rows)).to(torch.float32).softmax(-1)
        base_entropy = torch.special.entr(base_probability).sum(-1)
    hidden = draft_hidden(base.model, transfer, context, batch.anchors)
    losses = []
    for k in range(transfer.num_steps):
        logits = parts.head(parts.norm(hidden[:, :, k][used])).to(torch.float32)
        cross = cross_entropy(logits, base_probability[index[:, k]])
        losses.append(cross - base_entropy[index[:, k]].mean())
    return torch.stack(losses)


def _show(losses: Tensor) -> str:
    return "/".join(f"{loss:.3f}" for loss in losses.tolist())


def _save_checkpoint(
    path: Path, transfer: TransferLayers, optimizer: torch.optim.Optimizer, step: int, fingerprint: dict[str, Any]
) -> None:
    tensors = {}
    for name, parameter in transfer.named_parameters():
        state = optimizer.state[parameter]
        tensors[name] = parameter.detach()
        tensors[f"{name}.exp_avg"] = state["exp_avg"]
        tensors[f"{name}.exp_avg_sq"] = state["exp_avg_sq"]
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"fit": json.dumps({"step": step, "run": fingerprint})})


def _load_checkpoint(
    path: Path, transfer: TransferLayers, optimizer: torch.optim.Optimizer, fingerprint: dict[str, Any]
) -> int:
    """Restore weights and optimizer from `path` and return the step to continue at; 0 when there is no checkpoint."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {})["fit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a checkpoint of ht-train fit ({error}); delete it to start again") from error
    if saved["run"] != json.loads(json.dumps(fingerprint)):
        raise InputError(
            f"{path} is the checkpoint of a run with other settings, data or base model; repeat those, "
            "name another --checkpoint, or delete it to start again"
        )
    for name, parameter in transfer.named_parameters():
        parameter.data = tensors[name]
        optimizer.state[parameter] = {
            "step": torch.tensor(float(saved["step"])),
            "exp_avg": tensors[f"{name}.exp_avg"],
            "exp_avg_sq": tensors[f"{name}.exp_avg_sq"],
        }
    return int(saved["step"])
