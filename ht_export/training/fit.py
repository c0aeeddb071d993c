"""Fitting transfer layers: KL to the frozen base model's distribution at random anchors of its own text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from rich.progress import Progress

from ht_export.model.checkpoint import BaseModel
from ht_export.model.transfer import TransferLayers, new_drafter
from ht_export.training.checkpoints import FitState, load_checkpoint, save_checkpoint
from ht_export.training.data import AnsweredPrompt, fingerprint
from ht_export.training.draft_tokens import choose_draft_tokens, covered
from ht_export.training.evaluate import evaluate, headline
from ht_export.training.memory import estimate
from ht_export.training.optimizers import make_optimizers
from ht_export.training.settings import FitSettings, compared
from ht_export.training.start import copy_start
from ht_export.training.trainer import Trainer, as_text
from runtime.errors import InputError


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
    trainer = Trainer(base, data, settings, state, accelerator, feature_cache, progress)
    if checkpoint.exists():
        load_checkpoint(checkpoint, state, run)
        report(f"continuing at step {state.step} from {checkpoint}")
    else:
        trainer.initialise(start.num_steps if start and settings.init == "file" else 0, progress)
    trainer.agree()
    bar = progress.add_task("fitting", total=settings.steps, completed=state.step)
    measured = ""
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
                measured = f"  held-out top-1/2/4/8 {headline(found)}"
                report(f"step {state.step}: loss {as_text(by_step)}{measured}")
            if found and log:
                _log_acceptance(log, found, state.step)
        if accelerator.is_main_process and (state.step % checkpoint_every == 0 or state.step == settings.steps):
            save_checkpoint(checkpoint, state, run)
            # The bar is not seen where output goes to a file.
            report(f"step {state.step}: loss {as_text(by_step)}, {speed:,.0f} anchors/s, saved {checkpoint}")
        progress.update(
            bar, completed=state.step, description=f"fitting  loss {as_text(by_step)}  {speed:,.0f} anchors/s{measured}"
        )
    if settings.patience and state.best:
        transfer.load_state_dict(state.best)
    if settings.loss_size is not None:
        transfer.draft_tokens = None
    speed = state.anchors / state.seconds if state.seconds else 0.0
    best_step = state.best_step if settings.patience else state.step
    return transfer, FitReport(state.step, best_step, speed, state.peak_memory)


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
