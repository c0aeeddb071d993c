"""Part 5: training at scale. What `ht-train` does, stage by stage, within the time that there is."""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ht_export.gpu_day.models import check_weights, dtypes, reference_generator
from ht_export.gpu_day.own_files import read_json
from ht_export.gpu_day.settings import DaySettings, NotHereError
from ht_export.gpu_day.stages import Sections
from ht_export.model.known import KNOWN_MODELS

DRAFT_STEPS = 4
SEQUENCES, ANCHORS = 16, 64
# Of the time that is left, for the steps of the fit and its measurements; the rest measures what came of it.
FIT_SHARE = 0.75
LEAST_STEPS, MOST_PASSES, MEASUREMENTS = 20, 60, 30
# Measurements in a row that bring nothing more, after which it has converged.
PATIENCE = 6
HELD_OUT_TEXTS = 60
NEW_TOKENS, MOST_PROMPT_TOKENS = 128, 256
ANSWERS_AT_ONCE = 64
# Prompts that a rehearsal answers.
REHEARSED = 3
SWEEP_STEPS = 120
# What an added row costs where rows are nearly free, in plain passes.
ROW_COST = 0.003
TRANSFER, PACE = "transfer.safetensors", "pace.json"
CHECKPOINT = f"{TRANSFER}.checkpoint"
ANSWERS = "answers.zip"


def fit_sections(settings: DaySettings) -> Sections:
    """Yield a fit to the text that there is, and what it and the shipped layers are worth on dev prompts."""
    yield "data", lambda: _describe_data(settings)
    yield "pace", lambda: _pace(settings)
    yield "fit", lambda: _fit(settings)
    yield "dev prompts", lambda: _evaluate(settings, _folder(settings) / TRANSFER, "new")
    if settings.model in KNOWN_MODELS:
        yield "dev prompts, shipped", lambda: _evaluate_shipped(settings)


def answer_sections(settings: DaySettings) -> Sections:
    """Yield the model's own answers to all train prompts, made here: what stopped before its end goes on there."""
    yield "held-out answers", lambda: _answers(settings, "held-out")
    yield "answers", lambda: _answers(settings, "data")


def sweep_sections(settings: DaySettings) -> Sections:
    """Yield a comparison of placements and numbers of draft steps."""
    yield "placements", lambda: _sweep(settings)


def kept_files(settings: DaySettings) -> list[Path]:
    """Return the files that come back with the results: the layers, or the fit that is not finished, with its pace; and
    answers that were made.
    """
    folder = _folder(settings)
    finished = (folder / TRANSFER).is_file()
    found = [folder / name for name in (PACE, TRANSFER if finished else CHECKPOINT)]
    made = [folder / "made-held-out", folder / "made-data"]
    if any((one / "manifest.json").is_file() for one in made):
        _zip(made, settings.work / ANSWERS)
        found.append(settings.work / ANSWERS)
    return [path for path in found if path.is_file()]


def restore(settings: DaySettings) -> None:
    """Put what `kept_files` gave, and is in the work folder again, where it was."""
    folder = _folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (PACE, TRANSFER, CHECKPOINT):
        if (settings.work / name).is_file() and not (folder / name).exists():
            (settings.work / name).replace(folder / name)
    if (settings.work / ANSWERS).is_file() and not (folder / "made-data").exists():
        _unzip(settings.work / ANSWERS, folder)


def _folder(settings: DaySettings) -> Path:
    return settings.work / "training"


def _data(settings: DaySettings) -> tuple[Path, Path]:
    """Return the folders of answers to fit to and to measure on: those made here where they are complete, else carried
    ones. Raises `NotHereError` where there are none.
    """
    folder = _folder(settings)
    found = []
    for name in ("data", "held-out"):
        places = [folder / f"made-{name}", settings.kit / name]
        complete = [place for place in places if _is_complete(place)]
        if not complete:
            raise NotHereError(f"no answers to fit to: neither made here nor carried ({name})")
        found.append(complete[0])
    return found[0], found[1]


def _is_complete(folder: Path) -> bool:
    manifest = folder / "manifest.json"
    return manifest.is_file() and _own(manifest).get("shards") is not None


def _describe_data(settings: DaySettings) -> dict[str, Any]:
    check_weights(settings)
    if settings.rehearsal and not _is_complete(settings.kit / "data"):
        # A few words of the model itself, so that there is something to fit to.
        for name in ("held-out", "data"):
            _answers(settings, name)
    found = {}
    for name, folder in zip(("data", "held_out"), _data(settings), strict=True):
        manifest = _own(folder / "manifest.json")
        found[name] = {
            "folder": folder.name,
            **{key: manifest.get(key) for key in ("dtype", "sequences", "answer_tokens", "settings")},
        }
    return found


def _pace(settings: DaySettings) -> dict[str, Any]:
    """Time some steps and choose how many there are time for; kept, as a fit goes on as it was begun."""
    from ht_export.model.checkpoint import load_base_model
    from ht_export.progress import progress_bar
    from ht_export.prompts import evenly
    from ht_export.training.data import read_data
    from ht_export.training.recipe.pace import seconds_per_step
    from ht_export.training.settings import FitSettings
    from runtime.files import write_json

    base = load_base_model(settings.model, _dtype(settings))
    base.model.to(settings.device)
    layers = _layers(base.model.config.num_hidden_layers, settings)
    data, held_out = (read_data(folder, base, len(layers) + 1) for folder in _data(settings))
    measured = evenly(held_out, 2 if settings.rehearsal else HELD_OUT_TEXTS)
    sequences, anchors = (2, 4) if settings.rehearsal else (SEQUENCES, ANCHORS)
    wanted = FitSettings(layers, sequences=sequences, anchors=anchors, correction_rank=_rank(settings))
    with progress_bar() as progress:
        step, measurement = seconds_per_step(base, data, measured, wanted, progress)
    seconds = FIT_SHARE * max(0.0, settings.seconds_left()) - (MEASUREMENTS + 1) * measurement
    most = math.ceil(MOST_PASSES * len(data) / sequences)
    steps = 3 if settings.rehearsal else max(LEAST_STEPS, min(int(seconds / step), most))
    pace = {
        "steps": steps,
        "seconds_per_step": step,
        "seconds_per_measurement": measurement,
        "layers": list(layers),
        "sequences": sequences,
        "anchors": anchors,
    }
    write_json(_folder(settings) / PACE, pace)
    return pace


def _fit(settings: DaySettings) -> dict[str, Any]:
    path = _folder(settings) / PACE
    if not path.is_file():
        raise NotHereError("no pace was set for the fit")
    pace = _own(path)
    data, held_out = _data(settings)
    out = _folder(settings) / TRANSFER
    steps = pace["steps"]
    words = ["fit", settings.model, "--data", str(data), "--held-out", str(held_out), "--out", str(out)]
    words += ["--layers", ",".join(map(str, pace["layers"])), "--steps", str(steps)]
    words += ["--sequences", str(pace["sequences"]), "--anchors", str(pace["anchors"])]
    words += ["--correction-rank", str(_rank(settings)), "--patience", str(PATIENCE)]
    words += ["--evaluate-every", str(max(1, steps // MEASUREMENTS)), "--evaluate-texts", str(HELD_OUT_TEXTS)]
    often = max(1, min(100, int(20 / max(pace["seconds_per_step"], 1e-3))))
    words += ["--checkpoint-every", str(often), "--seed", str(settings.seed), *_machine(settings)]
    said = _train(words)
    about = _about(out)
    return {"said": said, "recipe": about["recipe"], "acceptance": about["acceptance"], "bytes": out.stat().st_size}


def _evaluate(settings: DaySettings, transfer: Path, name: str) -> dict[str, Any]:
    """Measure transfer layers on answers to dev prompts, in float32."""
    if not transfer.is_file():
        raise NotHereError(f"no {transfer.name}: the fit has not ended")
    _, held_out = _data(settings)
    out = _folder(settings) / f"eval-{name}"
    device = ["--device", settings.device]
    _train(["eval", settings.model, "--transfer", str(transfer), "--data", str(held_out), "--out", str(out), *device])
    return _own(out / "eval.json")


def _evaluate_shipped(settings: DaySettings) -> dict[str, Any]:
    from ht_export.model.shipped import shipped_transfer

    return _evaluate(settings, shipped_transfer(settings.model), "shipped")


def _sweep(settings: DaySettings) -> dict[str, Any]:
    data, held_out = _data(settings)
    out = _folder(settings) / "sweep"
    words = ["sweep", settings.model, "--data", str(data), "--held-out", str(held_out), "--out", str(out)]
    words += ["--row-cost", str(ROW_COST), "--seed", str(settings.seed)]
    if settings.rehearsal:
        words += ["--draft-steps", "1", "--steps", "2", "--rungs", "1", "--sequences", "1", "--anchors", "2"]
        words += ["--evaluate-texts", "1", "--correction-rank", "2", "--placement", "1", "--placement", "2"]
    else:
        words += ["--draft-steps", str(DRAFT_STEPS), "--steps", str(SWEEP_STEPS), "--evaluate-texts", "30"]
        words += ["--sequences", str(SEQUENCES)]
    said = _train([*words, *_machine(settings)])
    return {"said": said, "sweep": _own(out / "sweep.json")}


def _answers(settings: DaySettings, name: str) -> dict[str, Any]:
    """Answer prompts by the PyTorch reference, many at once; what an earlier run has answered is there already."""
    from ht_export.progress import progress_bar
    from ht_export.training.generate import DataSettings, generate_data

    prompts, held_out = _prompts(settings)
    asked, excluded = (held_out, None) if name == "held-out" else (prompts, held_out)
    tokens = 6 if settings.rehearsal else NEW_TOKENS
    wanted = DataSettings(
        max_prompts=REHEARSED if settings.rehearsal else None,
        max_prompt_tokens=MOST_PROMPT_TOKENS,
        max_new_tokens=tokens,
        seed=settings.seed,
    )
    folder = _folder(settings) / f"made-{name}"
    many = 2 if settings.rehearsal else ANSWERS_AT_ONCE
    with (
        reference_generator(settings, dtypes(settings)[-1], adapt=False, max_batch=many) as generator,
        progress_bar() as progress,
    ):
        generate_data(generator, asked, folder, wanted, progress, excluded)
    manifest = _own(folder / "manifest.json")
    return {key: manifest.get(key) for key in ("dtype", "sequences", "answer_tokens", "too_long")}


def _prompts(settings: DaySettings) -> tuple[Path, Path]:
    """Return carried prompts, to train on and to measure on, or those of our own example."""
    carried = settings.kit / "train-prompts.jsonl", settings.kit / "dev-prompts.jsonl"
    if all(path.is_file() for path in carried):
        return carried
    from ht_export.example_prompts import write_examples

    folder = _folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "prompts.jsonl", folder / "held-out.jsonl"
    write_examples(*made)
    return made


def _train(words: Sequence[str]) -> str:
    """Run a command of `ht-train` in this process; return the end of what it printed. Raises `RuntimeError`."""
    from ht_export.training.cli import main

    printed, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        status = main(list(words))
    said = (printed.getvalue() + told.getvalue())[-2000:]
    if status:
        raise RuntimeError(f"ht-train {' '.join(words)} ended with status {status}: {said}")
    return said


def _about(path: Path) -> dict[str, Any]:
    from ht_export.model.transfer import load_transfer_layers

    _, about = load_transfer_layers(path)
    return {"recipe": about.recipe, "acceptance": about.acceptance}


def _layers(layers: int, settings: DaySettings) -> tuple[int, ...]:
    from ht_export.model.transfer import default_layers

    return default_layers(layers, 2 if settings.rehearsal else DRAFT_STEPS)


def _rank(settings: DaySettings) -> int:
    return 4 if settings.rehearsal else 128


def _dtype(settings: DaySettings) -> Any:
    import torch

    return torch.float32 if settings.rehearsal else torch.bfloat16


def _machine(settings: DaySettings) -> list[str]:
    return ["--device", settings.device, "--dtype", "float32" if settings.rehearsal else "bfloat16"]


def _own(path: Path) -> dict[str, Any]:
    return read_json(path, "delete the folder --work, or name another")


def _zip(folders: Sequence[Path], target: Path) -> None:
    from runtime.files import atomic_path

    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in folders:
            for path in sorted(folder.glob("*.json*")):
                archive.write(path, f"{folder.name}/{path.name}")


def _unzip(source: Path, folder: Path) -> None:
    with zipfile.ZipFile(source) as archive:
        archive.extractall(folder)
