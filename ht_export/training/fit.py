"""Fitting transfer layers: KL to the frozen base model's distribution at random anchors of its own text."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.progress import Progress
from torch import Tensor

from ht_export.model.checkpoint import BaseModel
from ht_export.model.families import decoder_parts
from ht_export.model.reference import draft_head
from ht_export.model.transfer import DRAFTERS, Drafter, TransferLayers, new_drafter
from ht_export.training.batches import AnchorBatch, BatchSampler
from ht_export.training.checkpoints import FitState, load_checkpoint, save_checkpoint
from ht_export.training.data import AnsweredPrompt, fingerprint
from ht_export.training.draft_tokens import choose_draft_tokens, covered
from ht_export.training.drafts import Context, draft_hidden, run_context
from ht_export.training.evaluate import evaluate, headline
from ht_export.training.features import FeatureCache
from ht_export.training.losses import Objective, draft_losses
from ht_export.training.memory import estimate, peak_memory
from ht_export.training.optimizers import OPTIMIZERS, make_optimizers
from ht_export.training.start import copy_start, regress
from runtime.checks import MOST_REPEATS
from runtime.errors import InputError

INITIALISATIONS = ("ridge", "identity", "file")
SCHEDULES = ("cosine", "constant")
# More is a mistyped number: a step would not end, float32 overflow, or no memory hold it.
MOST = {"accumulate": MOST_REPEATS, "learning_rate": 1000, "correction_rank": 2**16}
# Settings that checkpoints of earlier releases do not say.
LATER = ("drafter", "loss_choice", "optimizer")


@dataclass(frozen=True)
class FitSettings:
    """Options of a fit of transfer layers. Runs with equal ones, data and precision give equal weights on a CPU.

    A step takes `accumulate` batches of `sequences` texts with `anchors` anchors each, whatever the number of
    processes. `init` "file" begins with transfer layers trained before; steps that those lack begin by ridge
    regression. `patience` is how many held-out measurements
    in a row may bring nothing before the fit stops; 0 never stops it. With a `draft_size` drafts are chosen from so
    many tokens, those that the data has most of; None takes those of the start, or the whole vocabulary. With a
    `loss_size` the loss runs over so many tokens, and drafts are chosen from the whole vocabulary. `drafter`
    "medusa" trains Medusa heads by the same loss; they begin as the identity and have no token correction. The
    `optimizer` "muon" is Muon (torch's) for the maps, and AdamW for the rest.
    """

    layers: tuple[int, ...]
    steps: int = 500
    sequences: int = 8
    anchors: int = 64
    accumulate: int = 1
    init: str = "ridge"
    correction_rank: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    schedule: str = "cosine"
    final_learning_rate: float = 0.02
    max_gradient_norm: float = 1.0
    step_weights: tuple[float, ...] | None = None
    loss_temperature: float = 1.0
    loss_top_k: int = 0
    loss_choice: float = 0.0
    patience: int = 0
    seed: int = 0
    draft_size: int | None = None
    drafter: Drafter = "transfer"
    loss_size: int | None = None
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "anchors", "accumulate", "learning_rate", "max_gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be more than 0, not {getattr(self, name)}")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise InputError(f"{name} must be at most {most}, not {getattr(self, name)}")
        for name in ("correction_rank", "patience", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise InputError(f"{name} must be at least 0, not {getattr(self, name)}")
        choices = {"init": INITIALISATIONS, "schedule": SCHEDULES, "drafter": DRAFTERS, "optimizer": OPTIMIZERS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)}")
        if self.draft_size is not None and self.loss_size is not None:
            raise InputError(
                f"a draft head of {self.draft_size} tokens has the loss run over these alone; leave loss_size "
                f"{self.loss_size} out, or draft_size, to choose drafts from the whole vocabulary"
            )
        if self.drafter == "medusa" and self.init == "ridge":
            raise InputError("Medusa heads are no regression: they begin as the identity; leave --init ridge out")
        if self.step_weights is not None and len(self.step_weights) != len(self.layers):
            raise InputError(
                f"step_weights has {len(self.step_weights)} numbers for {len(self.layers)} draft steps; give one each"
            )
        _ = self.objective

    @property
    def head_size(self) -> int | None:
        """How many tokens the loss runs over; None for those of the start, or the whole vocabulary."""
        return self.draft_size if self.loss_size is None else self.loss_size

    @property
    def objective(self) -> Objective:
        """The loss that these settings ask for."""
        weights = self.step_weights or (1.0,) * len(self.layers)
        return Objective(weights, self.loss_temperature, self.loss_top_k, self.loss_choice)

    def rate(self, step: int) -> float:
        """Return the learning rate of `step` (from 0): linear warm-up, then constant or a cosine to a small share."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        low = self.final_learning_rate
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


class MetricLog(Protocol):
    """Where the numbers of a fit go; `torch.utils.tensorboard.SummaryWriter` is one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Record one value."""
        ...


@dataclass(frozen=True)
class FitReport:
    """The cost of a fit: anchors per second of training time, peak memory in bytes, and the steps taken."""

    steps: int
    best_step: int
    anchors_per_second: float
    peak_memory: int


def fit(
    base: BaseModel,
    data: Sequence[AnsweredPrompt],
    settings: FitSettings,
    checkpoint: Path,
    progress: Progress,
    *,
    start: TransferLayers | None = None,
    held_out: Sequence[AnsweredPrompt] = (),
    evaluate_every: int = 100,
    checkpoint_every: int = 50,
    draft_texts: Sequence[Sequence[int]] = (),
    feature_cache: Path | None = None,
    log: MetricLog | None = None,
    accelerator: Accelerator | None = None,
    report: Callable[[str], None] = print,
) -> tuple[TransferLayers, FitReport]:
    """Train transfer layers for `base` on `data`, continuing from `checkpoint` when that exists.

    `start` are the transfer layers to begin with where `settings.init` is "file"; they stay as they are. `held_out` is
    measured every `evaluate_every` steps. With `settings.patience` the fit stops when that brings nothing more, and the
    best weights are returned; without, it steers nothing. `draft_texts`, as tokens, have further words for a draft
    head. Under `accelerate launch` or `torchrun` the batches of a step are shared among the processes. Raises
    `InputError`.
    """
    accelerator = accelerator or Accelerator(cpu=base.model.device.type == "cpu")
    for name, value in (("checkpoint_every", checkpoint_every), ("evaluate_every", evaluate_every)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if settings.patience and not held_out:
        raise InputError("stopping early needs held-out data: give --held-out, or leave --patience at 0")
    if settings.accumulate % accelerator.num_processes:
        raise InputError(
            f"{accelerator.num_processes} processes cannot share {settings.accumulate} batches of a step evenly; make "
            "--accumulate a multiple of their number"
        )
    torch.manual_seed(settings.seed)
    draft_tokens = start.draft_tokens if start else None
    if settings.head_size is not None:
        vocab_size = base.model.config.vocab_size
        draft_tokens = choose_draft_tokens(data, settings.head_size, vocab_size, base.stop_tokens(), draft_texts)
    if draft_tokens is not None:
        share = covered(draft_tokens, data)
        what = "drafts are chosen from" if settings.loss_size is None else "the loss runs over"
        report(f"{what} {len(draft_tokens)} tokens, {share:.2%} of those of the answers")
    hidden_size = base.model.config.hidden_size
    transfer = new_drafter(settings.drafter, settings.layers, hidden_size, settings.correction_rank, draft_tokens)
    transfer.check_layers(base.model.config.num_hidden_layers)
    if settings.init == "file":
        copy_start(transfer, start)
    needed = estimate(base, transfer, settings.sequences, settings.anchors, max(map(len, data)))
    needed.check(base.model.device)
    transfer.to(base.model.device)
    by_muon = transfer.maps if settings.optimizer == "muon" else ()
    state = FitState(transfer, make_optimizers(transfer, by_muon, settings.learning_rate))
    run = _run_identity(settings, base, data)
    if settings.init == "file":
        run["start"] = transfer.digest()
    if draft_texts:
        run["draft_texts"] = hashlib.sha256(json.dumps(list(map(list, draft_texts))).encode()).hexdigest()
    if settings.patience:
        run |= {"held_out": fingerprint(held_out), "evaluate_every": evaluate_every}
    trainer = _Trainer(base, data, settings, state, accelerator, feature_cache, progress)
    if checkpoint.exists():
        load_checkpoint(checkpoint, state, run)
        report(f"continuing at step {state.step} from {checkpoint}")
    else:
        trainer.initialise(start.num_steps if start and settings.init == "file" else 0, progress)
    trainer.agree()
    bar = progress.add_task("fitting", total=settings.steps, completed=state.step)
    shown = ""
    while state.step < settings.steps and not _stopping(state, settings, evaluate_every):
        by_step = trainer.step()
        speed = state.anchors / state.seconds
        if log:
            for k, loss in enumerate(by_step.tolist(), start=1):
                log.add_scalar(f"loss/step_{k}", loss, state.step)
            log.add_scalar("learning_rate", settings.rate(state.step - 1), state.step)
            log.add_scalar("anchors_per_second", speed, state.step)
        if held_out and (state.step % evaluate_every == 0 or state.step == settings.steps):
            found = evaluate(base, transfer, held_out) if accelerator.is_main_process else None
            state.note(trainer.shared(_weighted(found["kl"], settings) if found else 0.0))
            if found:
                shown = f"  held-out top-1/2/4/8 {headline(found)}"
                report(f"step {state.step}: loss {_show(by_step)}{shown}")
            if found and log:
                _log_acceptance(log, found, state.step)
        if accelerator.is_main_process and (state.step % checkpoint_every == 0 or state.step == settings.steps):
            save_checkpoint(checkpoint, state, run)
            # The bar is not seen where output goes to a file.
            report(f"step {state.step}: loss {_show(by_step)}, {speed:,.0f} anchors/s, saved {checkpoint}")
        progress.update(
            bar, completed=state.step, description=f"fitting  loss {_show(by_step)}  {speed:,.0f} anchors/s{shown}"
        )
    if settings.patience and state.best:
        transfer.load_state_dict(state.best)
    if settings.loss_size is not None:
        transfer.draft_tokens = None
    speed = state.anchors / state.seconds if state.seconds else 0.0
    best_step = state.best_step if settings.patience else state.step
    return transfer, FitReport(state.step, best_step, speed, state.peak_memory)


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


class _Trainer:
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
                f"the loss is not finite at step {state.step + 1} ({_show(by_step)}); lower --learning-rate, or use "
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


def _run_identity(settings: FitSettings, base: BaseModel, data: Sequence[AnsweredPrompt]) -> dict[str, Any]:
    """Return what a resumed run must have in common with the run of its checkpoint."""
    run = {**compared(settings), "base model": base.weights_sha256, "data": fingerprint(data)}
    # Where they decide nothing about a step they may differ: a run can be made longer.
    del run["patience"]
    if settings.schedule == "constant":
        del run["steps"]
    run["dtype"] = str(base.model.dtype)
    # None where there is none: a checkpoint that says one is of another run.
    run |= {"start": None, "draft_texts": None}
    return run


def compared(settings: FitSettings) -> dict[str, Any]:
    """Return the settings by which a run is told from another: None for what nobody asks for of those that files of
    earlier releases do not say.
    """
    unsaid = [one.name for one in fields(settings) if one.name in LATER and getattr(settings, one.name) == one.default]
    return asdict(settings) | dict.fromkeys(unsaid)


def _stopping(state: FitState, settings: FitSettings, evaluate_every: int) -> bool:
    """Return whether as many held-out measurements as `patience` says brought nothing."""
    measured_since_best = (state.step - state.best_step) // evaluate_every
    return bool(settings.patience and state.best and measured_since_best >= settings.patience)


def _weighted(kl: Sequence[float], settings: FitSettings) -> float:
    return sum(weight * value for weight, value in zip(settings.objective.weights, kl, strict=True))


def _log_acceptance(log: MetricLog, found: dict[str, Any], step: int) -> None:
    for n, shares in found["top"].items():
        for k, share in enumerate(shares, start=1):
            log.add_scalar(f"held_out/step_{k}_top_{n}", share, step)
    for k, kl in enumerate(found["kl"], start=1):
        log.add_scalar(f"held_out/step_{k}_kl", kl, step)
    for rows, tokens in found["tokens_per_step"].items():
        log.add_scalar(f"held_out/tokens_per_step_{rows}_rows", tokens, step)


def _show(losses: Tensor) -> str:
    return "/".join(f"{loss:.3f}" for loss in losses.tolist())
