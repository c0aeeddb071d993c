"""The commands of `ht-train`, given their options."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from rich.progress import Progress

from ht_export.alone import alone
from ht_export.model.blocks import SKIPPED_BLOCKS, SkippedBlocks, write_skipped_blocks
from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.transfer import (
    DRAFTERS,
    TransferFile,
    default_layers,
    load_transfer_layers,
    save_transfer_layers,
)
from ht_export.progress import progress_bar, stage_display
from ht_export.prompts import evenly, read_conversations
from ht_export.settings import ExportSettings
from ht_export.training.acceptance import measure_acceptance
from ht_export.training.data import MANIFEST, AnsweredPrompt, fingerprint, read_data
from ht_export.training.draft_tokens import choose_draft_tokens, described
from ht_export.training.engine import data_engine
from ht_export.training.fit import MetricLog, fit
from ht_export.training.generate import DataSettings, Part, generate_data
from ht_export.training.machine import fit_device
from ht_export.training.merging import merge
from ht_export.training.plots import plot_acceptance, plot_sweep
from ht_export.training.settings import INITIALISATIONS, FitSettings
from ht_export.training.skip_record import SearchRecord
from ht_export.training.skip_search import Found, SearchSettings, search
from ht_export.training.sweep import SweepSettings, default_placements, recommendation, sweep, table
from ht_export.versions import PROJECT, version_of
from runtime import Generator
from runtime.bundle.engine_file import MOST_BATCH
from runtime.bundle.places import ENGINE_SUFFIXES
from runtime.checks import whole
from runtime.drafting.correction import SHORTLIST
from runtime.errors import InputError
from runtime.files import atomic_path, check_readable, check_writable, unwritable, write_json

DEFAULT_CORRECTION_RANK = 128


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
        shard_size=options.shard_size,
        seed=options.seed,
        part=Part() if options.part is None else Part(*options.part),
    )
    batch_size = whole("--batch-size", options.batch_size, 1, MOST_BATCH)
    # Before an engine is exported for them.
    read_conversations(options.prompts)
    check_writable(options.out / MANIFEST)
    options.out.mkdir(parents=True, exist_ok=True)
    with _alone(options.out):
        with stage_display() as stage:
            engine = data_engine(
                options.model, options.out, options.precision, options.transfer, stage, tuple(options.adapters)
            )
        made = Generator(engine, device=options.device, threads=options.threads, max_batch=batch_size)
        with made as generator, progress_bar() as progress:
            generate_data(generator, options.prompts, options.out, settings, progress, options.exclude)


def _alone(path: Path) -> AbstractContextManager[None]:
    return alone(path, f"another ht-train is at work on {path}; wait until it has ended, or choose another name")


def run_merge(options: argparse.Namespace) -> None:
    """Put the parts of a data folder together."""
    sequences = merge(options.parts, options.out)
    print(f"{options.out} has {sequences} answers of {len(options.parts)} parts", file=sys.stderr)


def run_fit(options: argparse.Namespace) -> None:
    """Train transfer layers and write them with what is known about them."""
    if options.max_texts is not None:
        whole("--max-texts", options.max_texts, 1)
    whole("--evaluate-texts", options.evaluate_texts, 1)
    check_writable(options.out)
    checkpoint = options.checkpoint or Path(f"{options.out}.checkpoint")
    check_writable(checkpoint)
    _check_outputs(options.out, checkpoint)
    if options.draft_prompts and options.draft_size is None and options.loss_size is None:
        raise InputError(
            f"--draft-prompts {options.draft_prompts} are words for a draft head, or for the loss; say how many tokens "
            "it has: --draft-size 8192 or --loss-size 16384"
        )
    versions = {"hidden-transfer": version_of(PROJECT), "torch": torch.__version__}
    # A launcher's processes share the work, each on its own device; one of them speaks.
    # They wait for one of them to fill a feature cache, far longer than collectives do by default.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(cpu=fit_device(options.device) == "cpu", kwargs_handlers=[patient])
    main = accelerator.is_main_process
    base = _load(options, accelerator.device)
    num_layers = base.model.config.num_hidden_layers
    chosen = _batches_and_loss(options)
    start, start_about = None, None
    drafter = options.drafter or DRAFTERS[0]
    if options.start:
        start, start_about = load_transfer_layers(options.start, base.identity())
        drafter = options.drafter or start.drafter
        if options.correction_rank is None:
            chosen["correction_rank"] = start.correction.rank if start.correction else 0
        chosen["init"] = "file"
    elif drafter == "medusa":
        chosen["init"] = options.init or "identity"
        chosen["correction_rank"] = options.correction_rank or 0
    layers = options.layers or (start.layers if start else default_layers(num_layers, drafter=drafter))
    settings = FitSettings(layers=layers, steps=options.steps, patience=options.patience, drafter=drafter, **chosen)
    data = _read_all(options.data, base, len(layers) + 1)
    if options.max_texts is not None:
        data = evenly(data, options.max_texts)
    held_out = read_data(options.held_out, base, len(layers) + 1) if options.held_out else []
    _check_apart(data, held_out, options)
    texts = _encoded(options.draft_prompts, base)
    with (
        _alone(checkpoint) if main else contextlib.nullcontext(),
        progress_bar(disable=not main) as progress,
        _tensorboard(options.log if main else None) as log,
    ):
        transfer, report = fit(
            base,
            data,
            settings,
            checkpoint,
            progress,
            start=start,
            held_out=evenly(held_out, options.evaluate_texts),
            evaluate_every=options.evaluate_every,
            checkpoint_every=options.checkpoint_every,
            draft_texts=texts,
            feature_cache=options.feature_cache,
            log=log,
            accelerator=accelerator,
            report=_reporter(progress),
        )
        if not main:
            return
        sizes = ExportSettings().tree(len(layers))
        acceptance: dict[str, Any] = {}
        if held_out:
            acceptance = measure_acceptance(base, transfer, held_out, sizes, progress)
    recipe = {
        **asdict(settings),
        "data": {"sequences": len(data), "answer_tokens": sum(len(sequence.answer) for sequence in data)},
        "dtype": options.dtype,
        "report": asdict(report),
        "versions": versions,
    }
    if transfer.draft_tokens is not None:
        recipe["draft_head"] = described(transfer.draft_tokens, data) | ({"prompts": len(texts)} if texts else {})
    if start_about:
        recipe["start"] = start_about.recipe
    save_transfer_layers(options.out, transfer, TransferFile(base.identity(), recipe, acceptance))
    print(
        f"wrote {options.out}: {report.steps} steps, {report.anchors_per_second:,.0f} anchors/s, "
        f"peak memory {report.peak_memory / 2**30:.1f} GiB",
        file=sys.stderr,
    )


def run_draft_head(options: argparse.Namespace) -> None:
    """Give transfer layers a draft head over the tokens that the data has most of."""
    check_writable(options.out)
    check_out(options.out)
    base = _load(options)
    transfer, about = load_transfer_layers(options.transfer, base.identity())
    data = _read_all(options.data, base, 1)
    least = transfer.num_steps + 1
    held_out = read_data(options.held_out, base, least) if options.held_out else []
    _check_apart(data, held_out, options)
    texts = _encoded(options.prompts, base)
    vocab_size = base.model.config.vocab_size
    tokens = choose_draft_tokens(data, options.size, vocab_size, base.stop_tokens(), texts)
    found = described(tokens, data) | {"prompts": len(texts)}
    transfer.draft_tokens = tokens
    transfer.to(base.model.device)
    # What was measured before is not of these drafts.
    acceptance: dict[str, Any] = {}
    if held_out:
        sizes = ExportSettings().tree(transfer.num_steps)
        with progress_bar() as progress:
            acceptance = measure_acceptance(base, transfer, held_out, sizes, progress)
    recipe = {**about.recipe, "draft_head": found}
    save_transfer_layers(options.out, transfer, TransferFile(about.base_model, recipe, acceptance))
    print(
        f"wrote {options.out}: drafts are chosen from {len(tokens)} tokens, {found['answer_tokens_covered']:.2%} of "
        f"those of the answers{'' if held_out else '; measure them with ht-train eval --store'}",
        file=sys.stderr,
    )


def run_eval(options: argparse.Namespace) -> None:
    """Print statistics of transfer layers; plot and store them when asked to."""
    base = _load(options)
    transfer, about = load_transfer_layers(options.transfer, base.identity())
    sizes = ExportSettings(options.tree_rows, options.pseudo_rows).tree(transfer.num_steps)
    if sizes.tree_rows > SHORTLIST:
        raise InputError(f"--tree-rows {sizes.tree_rows}: at most {SHORTLIST} can be simulated")
    if options.store:
        check_writable(options.transfer)
    if options.out:
        check_writable(options.out / "eval.json")
    data = read_data(options.data, base, transfer.num_steps + 1)
    transfer.to(base.model.device)
    with progress_bar() as progress:
        found = measure_acceptance(base, transfer, data, sizes, progress)
    if options.out:
        write_json(options.out / "eval.json", found)
        plot_acceptance(found, options.out)
    if options.store:
        save_transfer_layers(options.transfer, transfer, TransferFile(about.base_model, about.recipe, found))
    print(json.dumps(found, indent=2))


def run_sweep(options: argparse.Namespace) -> None:
    """Compare placements; print a table and a recommendation."""
    whole("--evaluate-texts", options.evaluate_texts, 1)
    check_writable(options.out / "sweep.json")
    base = _load(options)
    num_layers = base.model.config.num_hidden_layers
    if options.draft_steps < 1:
        raise InputError(f"--draft-steps must be at least 1, not {options.draft_steps}")
    placements = tuple(options.placements or default_placements(num_layers, options.draft_steps))
    most_steps = max(map(len, placements))
    settings = SweepSettings(placements, options.steps, options.rungs, options.row_cost)
    fit_settings = FitSettings(layers=placements[0], **_batches_and_loss(options))
    data = _read_all(options.data, base, most_steps + 1)
    held_out = evenly(read_data(options.held_out, base, most_steps + 1), options.evaluate_texts)
    _check_apart(data, held_out, options)
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
            report=_reporter(progress),
        )
    text = f"{table(rows)}\n\nRecommended {recommendation(rows, options.row_cost)}.\n"
    with atomic_path(options.out / "sweep.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    plot_sweep(rows, options.out / "sweep.png")
    print(text)


def run_skip_blocks(options: argparse.Namespace) -> None:
    """Search blocks to draft without, and write them with what they are worth."""
    whole("--texts", options.texts, 1)
    check_writable(options.out)
    if options.out.exists():
        SKIPPED_BLOCKS.read(options.out)
    settings = SearchSettings(options.budget, options.row_cost, options.seed, options.draft_tokens, options.confidence)
    checkpoint = Path(f"{options.out}.checkpoint")
    check_writable(checkpoint)
    base = _load(options)
    data = evenly(_read_all(options.data, base, 2), options.texts)
    # All that an evaluation depends on; more sets, or others, go on from it.
    run = {name: value for name, value in asdict(settings).items() if name not in ("budget", "seed")}
    run |= {"dtype": options.dtype, "base_model": base.identity(), "data_sha256": fingerprint(data)}
    with _alone(options.out), progress_bar() as progress:
        record = SearchRecord(checkpoint, run)
        bar = progress.add_task("searching", total=settings.budget)

        def tell(count: int, best: Found) -> None:
            described = f"searching  {best.speedup:.2f} times plain, {best.tokens_per_step:.2f} tokens per step"
            progress.update(bar, completed=count, description=described)

        found, evaluated = search(base, data, settings, tell, record.evaluated, record.add)
    about = {
        **asdict(settings),
        **found.described(),
        "evaluated": evaluated,
        "texts": len(data),
        "answer_tokens": sum(len(sequence.answer) for sequence in data),
        "dtype": options.dtype,
    }
    written = SkippedBlocks.of(found.blocks, base.identity(), found.draft_tokens, found.confidence, about)
    write_skipped_blocks(options.out, written)
    print(
        f"wrote {options.out}: drafts without {len(written.attention)} attention and {len(written.mlp)} MLP blocks, up "
        f"to {written.draft_tokens} tokens in a row until one has less than {written.confidence:g}; estimated "
        f"{found.speedup:.2f} times plain decoding, {found.tokens_per_step:.2f} tokens per step "
        f"({evaluated} sets evaluated)",
        file=sys.stderr,
    )


def _check_outputs(out: Path, checkpoint: Path) -> None:
    """Raise `InputError` for a file in the place of the transfer layers that is none of ours, such as the base model's
    weights, and for the checkpoint in that place.
    """
    if checkpoint.resolve() == out.resolve():
        raise InputError(f"--checkpoint {checkpoint} is --out too; choose another name for one of them")
    check_out(out)


def check_out(out: Path) -> None:
    """Raise `InputError` for the name of an engine, and for a file in the place of transfer layers that is not ours."""
    if out.suffix in ENGINE_SUFFIXES:
        raise InputError(f"--out {out} names an engine; transfer layers are a .safetensors file, for ht-export to take")
    if out.exists():
        try:
            load_transfer_layers(out)
        except InputError as error:
            raise InputError(f"--out is there and would be replaced, and {error}; choose another name") from error


def _load(options: argparse.Namespace, device: torch.device | str | None = None) -> BaseModel:
    base = load_base_model(options.model, getattr(torch, options.dtype), adapters=options.adapters)
    base.model.to(device or fit_device(options.device))
    return base


def _batches_and_loss(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "sequences": options.sequences,
        "anchors": options.anchors,
        "accumulate": options.accumulate,
        "learning_rate": options.learning_rate,
        "optimizer": options.optimizer,
        "init": options.init or INITIALISATIONS[0],
        "correction_rank": DEFAULT_CORRECTION_RANK if options.correction_rank is None else options.correction_rank,
        "step_weights": options.step_weights,
        "loss_temperature": options.loss_temperature,
        "loss_top_k": options.loss_top_k,
        "loss_choice": options.loss_choice,
        "seed": options.seed,
        "draft_size": options.draft_size,
        "loss_size": options.loss_size,
    }


def _read_all(folders: list[Path], base: BaseModel, min_answer_tokens: int) -> list[AnsweredPrompt]:
    """Return the sequences of all folders, in order."""
    if repeated := next((folder for n, folder in enumerate(folders) if folder in folders[:n]), None):
        raise InputError(f"--data names {repeated} twice; name each folder once")
    return [sequence for folder in folders for sequence in read_data(folder, base, min_answer_tokens)]


def _encoded(prompts: Path | None, base: BaseModel) -> list[list[int]]:
    """Return the tokens of the first turn of each prompt; none without a file."""
    if prompts is None:
        return []
    texts = [one.turns[0] for one in read_conversations(prompts)]
    encoded: list[list[int]] = base.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded


def _check_apart(data: list[AnsweredPrompt], held_out: list[AnsweredPrompt], options: argparse.Namespace) -> None:
    """Raise `InputError` when prompts are in both: what is measured on them would flatter."""
    trained_on = {tuple(sequence.prompt) for sequence in data}
    shared = sum(tuple(sequence.prompt) in trained_on for sequence in held_out)
    if shared:
        raise InputError(
            f"{shared} of the {len(held_out)} texts of --held-out {options.held_out} answer prompts that are in --data "
            f"{' '.join(map(str, options.data))} too; make that with: ht-train data --exclude HELD_OUT_PROMPTS"
        )


def _reporter(progress: Progress) -> Callable[[str], None]:
    """Return a function that prints a line above the bar; brackets in it are no markup."""
    return lambda text: progress.console.print(text, markup=False, highlight=False)


@contextlib.contextmanager
def _tensorboard(folder: Path | None) -> Iterator[MetricLog | None]:
    if folder is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    check_readable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    writer = SummaryWriter(str(folder))
    try:
        yield writer
    finally:
        writer.close()
