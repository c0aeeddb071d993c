"""The optimizer steps of a fit: batches of anchors, their losses and gradients, shared among processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.progress import Progress
from torch import Tensor

from ht_export.model.checkpoint import BaseModel
from ht_export.model.families import decoder_parts
from ht_export.model.reference import draft_head
from ht_export.model.transfer import TransferLayers
from ht_export.training.batches import AnchorBatch, BatchSampler
from ht_export.training.checkpoints import FitState
from ht_export.training.data import AnsweredPrompt
from ht_export.training.drafts import Context, draft_hidden, run_context
from ht_export.training.features import FeatureCache
from ht_export.training.losses import Objective, draft_losses
from ht_export.training.memory import peak_memory
from ht_export.training.settings import FitSettings
from ht_export.training.start import regress
from runtime.errors import InputError


def anchor_losses(
    base: BaseModel,
    transfer: TransferLayers,
    batch: AnchorBatch,
    context: Context,
    objective: Objective,
    share: float | None = None,
) -> Tensor:
    """Return the mean loss of each draft step over the batch's anchors, [K], times `share`.

    With a `share`, also add the gradients of that share of the objective to the parameters.
    """
    parts = decoder_parts(base.model)
    length = batch.input_ids.shape[1]
    used = batch.weights > 0
    steps = torch.arange(1, transfer.num_steps + 1, device=used.device)
    offsets = length * torch.arange(len(batch.anchors), device=used.device)
    # Position of the token before each draft, which is also the row whose output predicts what the draft stands for.
    targets = (batch.anchors[..., None] + steps + offsets[:, None, None])[used]
    with torch.set_grad_enabled(share is not None):
        drafts = draft_hidden(base.model, transfer, context, batch.anchors)[used]
        shifts = None
        if transfer.correction is not None:
            before = parts.embed(batch.input_ids.flatten()[targets])
            by_step = [transfer.correction(k, before[:, k]) for k in range(transfer.num_steps)]
            shifts = torch.stack(by_step, dim=1)
    states = context.hidden[len(parts.layers)].flatten(0, 1)
    read_by = draft_head(base.model, transfer)
    normalisers = None if context.normalisers is None else context.normalisers.flatten()
    losses = draft_losses(parts, drafts, states, targets, objective, shifts, read_by, normalisers, transfer.behind_norm)
    if share is None:
        return losses.by_step
    roots, gradients = [drafts], [losses.gradient * share]
    if shifts is not None and losses.shift_gradient is not None:
        roots.append(shifts)
        gradients.append(losses.shift_gradient * share)
    torch.autograd.backward(roots, gradients)
    return losses.by_step * share


class Trainer:
    """One process's share of the optimizer steps."""

    def __init__(
        self,
        base: BaseModel,
        data: Sequence[AnsweredPrompt],
        settings: FitSettings,
        state: FitState,
        accelerator: Accelerator,
        feature_cache: Path | None,
        progress: Progress,
    ) -> None:
        self.base = base
        self.data = data
        self.settings = settings
        self.state = state
        self.accelerator = accelerator
        self.sampler = BatchSampler(data, settings.sequences, settings.anchors, state.transfer.num_steps, settings.seed)
        self.cache: FeatureCache | None = None
        if feature_cache is not None:
            with accelerator.main_process_first():
                self.cache = FeatureCache(
                    feature_cache,
                    base,
                    state.transfer.layers,
                    data,
                    progress,
                    normalisers=bool(state.transfer.draft_size) and settings.objective.is_plain,
                )

    def initialise(self, known_steps: int, progress: Progress) -> None:
        """Set the weights to begin with that no file gives. Every process computes the same."""
        if self.settings.init == "identity" or self.settings.drafter == "medusa":
            return
        device = self.base.model.device
        regress(
            self.state.transfer,
            known_steps,
            self.data,
            self.settings.sequences,
            lambda batch: self._context(batch.to(device)),
            progress,
        )

    def agree(self) -> None:
        """Give every process the main one's weights: devices may round the regression differently."""
        if self.accelerator.num_processes == 1:
            return
        if self.shared(float(self.state.step)) != self.state.step:
            raise InputError("the processes see different checkpoints; put --checkpoint on storage that they share")
        for parameter in self.state.transfer.parameters():
            parameter.data = broadcast(parameter.data)

    def shared(self, value: float) -> float:
        """Return the main process's `value`."""
        if self.accelerator.num_processes == 1:
            return value
        return float(broadcast(torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)))

    def step(self) -> Tensor:
        """Take one optimizer step and return the mean loss of each draft step, [K], on the CPU."""
        started = perf_counter()
        settings, state, accelerator = self.settings, self.state, self.accelerator
        total = torch.zeros(state.transfer.num_steps, device=self.base.model.device)
        anchors = torch.zeros((), device=self.base.model.device)
        for micro in range(accelerator.process_index, settings.accumulate, accelerator.num_processes):
            batch = self.sampler.batch(state.step * settings.accumulate + micro).to(self.base.model.device)
            share = 1 / settings.accumulate
            anchors += (batch.weights > 0).sum()
            total += anchor_losses(self.base, state.transfer, batch, self._context(batch), settings.objective, share)
        if accelerator.num_processes > 1:
            total, anchors = accelerator.reduce(total, "sum"), accelerator.reduce(anchors, "sum")
            for parameter in state.transfer.parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = accelerator.reduce(gradient, "sum")
        by_step = total.cpu()
        if not torch.isfinite(by_step).all():
            raise InputError(
                f"the loss is not finite at step {state.step + 1} ({as_text(by_step)}); lower --learning-rate, or use "
                "--dtype float32. The last checkpoint is untouched"
            )
        torch.nn.utils.clip_grad_norm_(state.transfer.parameters(), settings.max_gradient_norm)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(state.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.anchors += int(anchors)
        state.seconds += perf_counter() - started
        state.peak_memory = max(state.peak_memory, peak_memory(self.base.model.device))
        return by_step

    def _context(self, batch: AnchorBatch) -> Context:
        if self.cache is not None:
            return self.cache.context(batch)
        return run_context(self.base.model, self.state.transfer.layers, batch.input_ids)


def as_text(losses: Tensor) -> str:
    """Return the losses by draft step, [K], as text."""
    return "/".join(f"{loss:.3f}" for loss in losses.tolist())
