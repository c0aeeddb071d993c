"""What the commands of `ht-train` do with their options."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ht_export.checkpoint import BaseModel, load_base_model
from ht_export.export import ExportSettings
from ht_export.progress import progress_bar
from ht_export.training.data import Sequence, read_data
from ht_export.training.evaluate import evaluate
from ht_export.training.fit import FitReport, FitSettings, MetricLog, fit
from ht_export.training.generate import DataSettings, generate_data
from ht_export.training.plots import plot_acceptance, plot_sweep
from ht_export.training.sweep import SweepSettings, default_placements, recommendation, sweep, table
from ht_export.transfer import TransferFile, load_transfer_layers, save_transfer_layers
from runtime.errors import InputError
from runtime.files import atomic_path, check_writable, write_json

DEFAULT_STEPS = 3


def run_data(options: argparse.Namespace) -> None:
    """Make a data folder."""
    settings = DataSettings(
        max_prompts=options.max_prompts,
        max_turns=options.max_turns,
        max_prompt_tokens=options.max_prompt_tokens,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    base = _load(options)
    with progress_bar() as progress:
        generate_data(base, options.prompts, options.out, settings, progress, options.exclude)


def run_fit(options: argparse.Namespace) -> None:
    """Train transfer layers and write them with what is known about them."""
    check_writable(options.out)
    # A launcher's processes share the work, each on its own device; one of them speaks.
    accelerator = Accelerator(cpu=_device(options) == "cpu")
    main = accelerator.is_main_process
    base = _load(options, accelerator.device)
    num_layers = base.model.config.num_hidden_layers
    layers = options.layers or (round(num_layers * 2 / 3),) * DEFAULT_STEPS
    settings = FitSettings(layers=layers, steps=options.steps, patience=options.patience, **_batches_and_loss(options))
    data = read_data(options.data, base, len(layers) + 1)
    held_out = read_data(options.held_out, base, len(layers) + 1) if options.held_out else []
    with progress_bar(disable=not main) as progress, _tensorboard(options.log if main else None) as log:
        transfer, report = fit(
            base,
            data,
            settings,
            options.checkpoint or Path(f"{options.out}.checkpoint"),
            progress,
            held_out=_spread(held_out, options.evaluate_texts),
            evaluate_every=options.evaluate_every,
            checkpoint_every=options.checkpoint_every,
            feature_cache=options.feature_cache,
            log=log,
            accelerator=accelerator,
            report=progress.console.print,
        )
        if not main:
            return
        sizes = ExportSettings().tree(len(layers))
        acceptance = evaluate(base, transfer, held_out, sizes, progress=progress) if held_out else {}
    recipe = {**asdict(settings), **_provenance(options, data, report)}
    save_transfer_layers(options.out, transfer, TransferFile(base.identity(), recipe, acceptance))
    print(
        f"wrote {options.out}: {report.steps} steps, {report.anchors_per_second:,.0f} anchors/s, "
        f"peak memory {report.peak_memory / 2**30:.1f} GiB",
        file=sys.stderr,
    )


def run_eval(options: argparse.Namespace) -> None:
    """Print statistics of transfer layers; plot and store them when asked to."""
    base = _load(options)
    transfer, about = load_transfer_layers(options.transfer, base.identity())
    sizes = ExportSettings(options.tree_rows, options.pseudo_rows).tree(transfer.num_steps)
    if options.store:
        check_writable(options.transfer)
    if options.out:
        check_writable(options.out / "eval.json")
    data = read_data(options.data, base, transfer.num_steps + 1)
    transfer.to(base.model.device)
    with progress_bar() as progress:
        found = evaluate(base, transfer, data, sizes, progress=progress)
    if options.out:
        write_json(options.out / "eval.json", found)
        plot_acceptance(found, options.out)
    if options.store:
        save_transfer_layers(options.transfer, transfer, TransferFile(about.base_model, about.recipe, found))
    print(json.dumps(found, indent=2))


def run_sweep(options: argparse.Namespace) -> None:
    """Compare placements; print a table and a recommendation."""
    check_writable(options.out / "sweep.json")
    base = _load(options)
    num_layers = base.model.config.num_hidden_layers
    placements = tuple(options.placements or default_placements(num_layers, options.draft_steps))
    most_steps = max(map(len, placements))
    settings = SweepSettings(placements, options.steps, options.rungs, options.row_cost)
    fit_settings = FitSettings(layers=placements[0], **_batches_and_loss(options))
    data = read_data(options.data, base, most_steps + 1)
    held_out = _spread(read_data(options.held_out, base, most_steps + 1), options.evaluate_texts)
    with progress_bar() as progress:
        rows = sweep(
            base,
            data,
            held_out,
            fit_settings,
            settings,
            options.out,
            progress,
            options.feature_cache,
            report=progress.console.print,
        )
    text = f"{table(rows)}\n\nRecommended {recommendation(rows, options.row_cost)}.\n"
    with atomic_path(options.out / "sweep.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    plot_sweep(rows, options.out / "sweep.png")
    print(text)


def _device(options: argparse.Namespace) -> str:
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA GPU here; use --device cpu, or install torch for CUDA")
    return options.device


def _load(options: argparse.Namespace, device: torch.device | str | None = None) -> BaseModel:
    base = load_base_model(options.model, getattr(torch, options.dtype))
    base.model.to(device or _device(options))
    return base


def _batches_and_loss(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "sequences": options.sequences,
        "anchors": options.anchors,
        "accumulate": options.accumulate,
        "learning_rate": options.learning_rate,
        "init": options.init,
        "correction_rank": options.correction_rank,
        "step_weights": options.step_weights,
        "loss_temperature": options.loss_temperature,
        "loss_top_k": options.loss_top_k,
        "seed": options.seed,
    }


def _provenance(options: argparse.Namespace, data: list[Sequence], report: FitReport) -> dict[str, Any]:
    return {
        "data": {"sequences": len(data), "answer_tokens": sum(len(sequence.answer) for sequence in data)},
        "dtype": options.dtype,
        "report": asdict(report),
        "versions": {"hidden-transfer": version("hidden-transfer"), "torch": torch.__version__},
    }


def _spread(sequences: list[Sequence], count: int) -> list[Sequence]:
    """Return about `count` of the sequences, evenly from first to last."""
    return sequences[:: max(1, len(sequences) // max(1, count))]


@contextlib.contextmanager
def _tensorboard(folder: Path | None) -> Iterator[MetricLog | None]:
    if folder is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    try:
        yield writer
    finally:
        writer.close()
