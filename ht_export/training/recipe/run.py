"""`ht-train all`: every stage is a command of `ht-train`, printed and run; what is done is not done again."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import torch

from ht_export.model.adapters import read_adapter
from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.transfer import TransferLayers, load_transfer_layers
from ht_export.progress import Whole, one_display, progress_bar
from ht_export.prompts import evenly, read_conversations
from ht_export.training.commands import DEFAULT_CORRECTION_RANK, check_out
from ht_export.training.data import MANIFEST, is_whole, long_answers, read_data
from ht_export.training.draft_tokens import check_draft_size
from ht_export.training.machine import engine_device, fit_device, has_bfloat16
from ht_export.training.recipe import choices as choosing
from ht_export.training.recipe.apart import keep_apart
from ht_export.training.recipe.choices import Choices
from ht_export.training.recipe.pace import MEASUREMENTS, pace_for, pace_of, seconds_per_step
from ht_export.training.recipe.record import RECORD, Pace, WorkFolder
from ht_export.training.recipe.report import NUMBERS
from ht_export.training.settings import FitSettings
from runtime.bundle.places import engine_file_path
from runtime.checks import MOST_REPEATS, number, whole
from runtime.errors import InputError
from runtime.files import check_writable, sha256_file

# Runs a command of `ht-train`, given its words.
Execute = Callable[[Sequence[str]], None]

DEFAULT_HOURS = 2.0
# A year: more is a mistyped number.
MOST_HOURS = 24.0 * 366
LONGEST_PROMPT = 256
EVALUATE_TEXTS = 40
# With --curve: parts of the texts that are fitted too.
PARTS = (4, 2)


@dataclass(frozen=True)
class Stage:
    """A command of `ht-train`, and the file that tells by its fingerprint whether what it left is still there.

    It leaves the files `also`, too, and statistics in the transfer layers that are `measured`.
    """

    name: str
    words: list[str]
    left: Path
    quiet: bool = False
    also: tuple[Path, ...] = ()
    measured: Path | None = None

    def fingerprint(self) -> str | None:
        """Return what tells the stage's outcome from another; None where there is none, or some of it is lost."""
        if not all(path.is_file() for path in (self.left, *self.also)):
            return None
        try:
            if self.left.suffix == ".safetensors":
                # By its weights: what is measured of them later is written into the file too.
                return load_transfer_layers(self.left)[0].digest()
            if self.left.name == MANIFEST and not is_whole(self.left.parent):
                return None
            found = sha256_file(self.left)
            if self.measured is None:
                return found
            acceptance = json.dumps(load_transfer_layers(self.measured)[1].acceptance, sort_keys=True)
            return hashlib.sha256((found + acceptance).encode()).hexdigest()
        except InputError:
            return None


def run_all(options: argparse.Namespace, execute: Execute) -> None:
    """Make transfer layers and their report; a run that was killed goes on where it was. Raises `InputError`."""
    _check(options)
    work = options.work or Path(f"{options.out}.work")
    check_writable(options.out)
    check_out(options.out)
    check_writable(work / RECORD)
    read_conversations(options.prompts)
    folder = WorkFolder(work, _asked(options))
    curve = PARTS if options.curve else ()
    with one_display("all stages", 5 + len(curve)) as shown:
        held_out = _held_out(options, work, shown)
        choices = folder.record.choices or _choose(options, folder, shown)
        answering = "held-out" not in folder.record.done
        for stage in _data_stages(options, work, held_out, choices, answering):
            _run(stage, folder, shown, execute)
        pace = folder.record.pace or _set_pace(options, folder, choices, 1 + len(curve), shown)
        for stage in _fit_stages(options, work, choices, pace, curve):
            _run(stage, folder, shown, execute)
        shown.say(f"wrote {options.out}; its report is {work / 'report' / 'report.md'}")
        export = ["ht-export", *_model(options), "--transfer", str(options.out), "--out", "engine.onnx"]
        shown.say(f"an engine with them: {shlex.join(export)}")


def _check(options: argparse.Namespace) -> None:
    if options.hours is not None:
        number("--hours", options.hours, 1e-6, MOST_HOURS)
    counts = "steps", "sequences", "anchors", "draft_steps", "batch_size"
    for name in (*counts, "max_prompts", "max_prompt_tokens", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None:
            whole(f"--{name.replace('_', '-')}", value, 1, MOST_REPEATS)
    if options.draft_size is not None:
        whole("--draft-size", options.draft_size)
    if options.layers and options.draft_steps and len(options.layers) != options.draft_steps:
        raise InputError(
            f"--layers names {len(options.layers)} draft steps and --draft-steps {options.draft_steps}; leave one out"
        )


def _asked(options: argparse.Namespace) -> dict[str, object]:
    """Return the options that a command which continues a run must repeat, by their names."""
    names = (
        "model",
        "layers",
        "draft_steps",
        "draft_size",
        "max_prompts",
        # None, where nobody says it, as in the records of earlier releases.
        "max_prompt_tokens",
        "max_new_tokens",
        "precision",
        "dtype",
        "sequences",
        "anchors",
        "hours",
        "steps",
        "curve",
        "seed",
    )
    asked: dict[str, object] = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    asked["model"] = asked.pop("--model")
    # None where there are none, as in the records of earlier releases.
    asked["--adapter"] = [read_adapter(folder).sha256 for folder in options.adapters] or None
    for name, path in (("--prompts", options.prompts), ("--held-out", options.held_out)):
        if path is not None and not path.is_file():
            raise InputError(f"{name}: no prompts file at {path}")
        asked[name] = sha256_file(path) if path is not None else None
    return asked


def _held_out(options: argparse.Namespace, work: Path, shown: Whole) -> Path:
    """Return the prompts to measure on, which are kept apart from the others where none are given."""
    if options.held_out is not None:
        return Path(options.held_out)
    path = work / "held-out.jsonl"
    if not path.is_file():
        count, of = keep_apart(options.prompts, path, options.max_prompts, options.seed)
        shown.say(f"{count} of {of} prompts, drawn at random, are kept apart to measure on: {path}")
    return path


def _choose(options: argparse.Namespace, folder: WorkFolder, shown: Whole) -> Choices:
    """Return what follows the model and the machine, where nobody said otherwise, and keep it."""
    device = fit_device(options.device)
    dtype: Literal["float32", "bfloat16"] = options.dtype or ("bfloat16" if has_bfloat16(device) else "float32")
    base = _loaded(options, dtype)
    draft_size = choosing.draft_size_of(base) if options.draft_size is None else options.draft_size or None
    wanted = Choices(
        layers=tuple(options.layers or choosing.layers_of(base, options.draft_steps, device)),
        draft_size=draft_size,
        precision=options.precision or choosing.precision_of(base),
        dtype=dtype,
        sequences=options.sequences or choosing.SEQUENCES,
        anchors=options.anchors or choosing.ANCHORS,
        accumulate=1,
        loss_size=choosing.loss_size_of(base, draft_size),
    )
    TransferLayers(wanted.layers, 1).check_layers(base.model.config.num_hidden_layers)
    if draft_size is not None and draft_size >= base.model.config.vocab_size:
        raise InputError(
            f"--draft-size must be less than the model's vocabulary of {base.model.config.vocab_size} tokens, not "
            f"{draft_size}; 0 is for all of it"
        )
    if draft_size is not None:
        check_draft_size(draft_size, base.model.config.vocab_size, base.stop_tokens())
    choices = wanted
    if options.sequences is None and options.anchors is None:
        longest = _longest_prompt(options) + options.max_new_tokens
        choices = choosing.within_memory(base, wanted, DEFAULT_CORRECTION_RANK, longest)
    folder.choose(choices)
    head = f"a draft head of {draft_size} tokens" if draft_size else "no draft head"
    head += f", a loss over {choices.loss_size} tokens" if choices.loss_size else ""
    shown.say(
        f"chosen for {base.name} on {device}: layers {','.join(map(str, choices.layers))}, {head}, answers in "
        f"{choices.precision}, fit in {choices.dtype}, steps of {choices.accumulate} x {choices.sequences} texts with "
        f"{choices.anchors} anchors each"
    )
    return choices


def _longest_prompt(options: argparse.Namespace) -> int:
    return LONGEST_PROMPT if options.max_prompt_tokens is None else int(options.max_prompt_tokens)


def _loaded(options: argparse.Namespace, dtype: str) -> BaseModel:
    base = load_base_model(options.model, getattr(torch, dtype), adapters=options.adapters)
    base.model.to(fit_device(options.device))
    return base


def _model(options: argparse.Namespace) -> list[str]:
    """Return the words that name the model of a stage: with its adapters, which each stage merges anew."""
    return [options.model, *(word for folder in options.adapters for word in ("--adapter", str(folder)))]


def _data_stages(
    options: argparse.Namespace, work: Path, held_out: Path, choices: Choices, answering: bool
) -> Iterator[Stage]:
    """Yield the stages that make texts; `answering` says that the engine of the first is needed still."""
    common = ["--max-new-tokens", str(options.max_new_tokens), "--max-prompt-tokens", str(_longest_prompt(options))]
    common += ["--seed", str(options.seed), "--device", engine_device(fit_device(options.device))]
    for name, value in (("--batch-size", options.batch_size), ("--threads", options.threads)):
        common += [name, str(value)] if value is not None else []
    words = ["data", *_model(options), "--prompts", str(options.prompts), "--exclude", str(held_out)]
    words += ["--out", str(work / "data"), "--precision", choices.precision, *common]
    words += ["--max-prompts", str(options.max_prompts)] if options.max_prompts is not None else []
    engine = _engine(work, choices)
    yield Stage("data", words, work / "data" / MANIFEST, also=(engine_file_path(engine),) if answering else ())
    words = ["data", str(engine), "--prompts", str(held_out), "--out", str(work / "held-out"), *common]
    yield Stage("held-out", words, work / "held-out" / MANIFEST)


def _engine(work: Path, choices: Choices) -> Path:
    return work / "data" / f"engine-{choices.precision}" / "engine.onnx"


def _set_pace(options: argparse.Namespace, folder: WorkFolder, choices: Choices, fits: int, shown: Whole) -> Pace:
    """Return the length of each of so many fits, from the time there is or the steps asked for, and keep it."""
    if options.steps is not None:
        pace = pace_of(options.steps)
        folder.set_pace(pace)
        return pace
    base = _loaded(options, choices.dtype)
    least = len(choices.layers) + 1
    data = read_data(folder.path / "data", base, least)
    held_out = evenly(read_data(folder.path / "held-out", base, least), EVALUATE_TEXTS)
    settings = FitSettings(
        layers=choices.layers,
        sequences=choices.sequences,
        anchors=choices.anchors,
        accumulate=choices.accumulate,
        correction_rank=DEFAULT_CORRECTION_RANK,
        draft_size=choices.draft_size,
        loss_size=choices.loss_size,
    )
    shown.say("timing some steps of the fit")
    with progress_bar() as progress:
        step, measurement = seconds_per_step(base, data, held_out, settings, progress)
    hours = DEFAULT_HOURS if options.hours is None else options.hours
    pace = pace_for(3600 * hours / fits, step, measurement, len(data), choices.sequences * choices.accumulate)
    folder.set_pace(pace)
    seconds = fits * (pace.steps * step + (MEASUREMENTS + 1) * measurement)
    ready = datetime.now() + timedelta(seconds=seconds)
    shown.say(
        f"a step takes {step:.2f} s: {pace.steps} steps{f' in each of {fits} fits' if fits > 1 else ''}, ready at "
        f"about {ready:%Y-%m-%d %H:%M}"
    )
    return pace


def _fit_stages(
    options: argparse.Namespace, work: Path, choices: Choices, pace: Pace, curve: Sequence[int]
) -> Iterator[Stage]:
    # Before any of them, as with too few texts nothing would come of the others.
    parts = _parts(work / "data", len(choices.layers) + 1, curve)
    yield _fit("fit", options, work, choices, pace, options.out)
    smaller = [work / f"fit-1-of-{part}.safetensors" for part in curve]
    for texts, out in zip(parts, smaller, strict=True):
        yield _fit(out.stem, options, work, choices, pace, out, texts)
    model = [*_model(options), "--transfer", str(options.out)]
    where = ["--device", options.device]
    measured = work / "eval"
    words = ["eval", *model, "--data", str(work / "held-out"), "--out", str(measured), "--store", *where]
    yield Stage("eval", words, measured / "eval.json", quiet=True, measured=options.out)
    words = ["report", *model, "--data", str(work / "data"), "--held-out", str(work / "held-out"), "--log"]
    words += [str(work / "log"), "--engine", str(_engine(work, choices)), "--out", str(work / "report"), *where]
    words += ["--threads", str(options.threads)] if options.threads is not None else []
    words += ["--curve", *map(str, smaller)] if smaller else []
    yield Stage("report", words, work / "report" / NUMBERS)


def _fit(
    name: str,
    options: argparse.Namespace,
    work: Path,
    choices: Choices,
    pace: Pace,
    out: Path,
    texts: int | None = None,
) -> Stage:
    """Return the fit to all texts, or to so many of them."""
    words = [
        "fit",
        *_model(options),
        "--data",
        str(work / "data"),
        "--held-out",
        str(work / "held-out"),
        "--out",
        str(out),
    ]
    words += ["--layers", ",".join(map(str, choices.layers)), "--steps", str(pace.steps)]
    words += ["--sequences", str(choices.sequences), "--anchors", str(choices.anchors)]
    words += ["--accumulate", str(choices.accumulate), "--dtype", choices.dtype, "--device", options.device]
    if choices.head_size is not None:
        size = "--loss-size" if choices.loss_size is not None else "--draft-size"
        words += [size, str(choices.head_size), "--draft-prompts", str(options.prompts)]
    words += ["--seed", str(options.seed), "--evaluate-every", str(pace.evaluate_every)]
    words += ["--checkpoint-every", str(pace.checkpoint_every), "--checkpoint", str(work / f"{name}.checkpoint")]
    if texts is None:
        words += ["--log", str(work / "log")]
    else:
        words += ["--max-texts", str(texts)]
    return Stage(name, words, out)


def _parts(data: Path, min_answer_tokens: int, curve: Sequence[int]) -> list[int]:
    """Return how many texts each fit to one of so many parts of a data folder has. Raises `InputError` for too few."""
    if not curve:
        return []
    texts = long_answers(data, min_answer_tokens)
    if texts < max(curve):
        raise InputError(
            f"--curve fits a quarter of the texts too, and {data} has {texts} answers of at least {min_answer_tokens} "
            "tokens; give more prompts, or leave --curve out, with another --work"
        )
    return [texts // part for part in curve]


def _run(stage: Stage, folder: WorkFolder, shown: Whole, execute: Execute) -> None:
    """Run a stage unless what it left is there."""
    command = shlex.join(["ht-train", *stage.words])
    done = folder.record.done.get(stage.name)
    if done is not None and done == stage.fingerprint():
        shown.begin(f"done before: {command}")
        return
    shown.begin(command)
    with contextlib.redirect_stdout(io.StringIO()) if stage.quiet else contextlib.nullcontext():
        execute(stage.words)
    left = stage.fingerprint()
    if left is None:
        raise InputError(f"{command} left no {stage.left}; run it by hand to see why")
    folder.finish(stage.name, left)
