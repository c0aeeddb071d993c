"""The conditions of a measurement: what a reader needs to judge its numbers, or to repeat it. No path of a machine."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ht_export.bench.settings import BenchSettings
from ht_export.model.blocks import SKIPPED_BLOCKS
from runtime.bundle.places import engine_file_path
from runtime.engines.opening import runs_on_cpu
from runtime.errors import InputError, one_line, shown
from runtime.files import sha256_file
from runtime.generator import Generator
from runtime.tree import TreeSizes
from runtime.tuning import cpu_name

ROOT = Path(__file__).resolve().parents[2]
ENGINE_LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")
MODEL_LIBRARIES = ("torch", "transformers")
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# When and how a measurement was made; another day may continue it.
OF_ONE_RUN = ("command", "date", "commit", "continued")
# Characters of what differs, where all does.
MOST_TOLD = 1000


def conditions_of(
    settings: BenchSettings,
    generator: Generator,
    others: Mapping[str, Generator],
    prompts: int,
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Return the conditions of a run that measures so many `prompts` with these engines."""
    about = generator.about
    paths = dict(settings.compare)
    libraries = ENGINE_LIBRARIES if settings.model is None else (*ENGINE_LIBRARIES, *MODEL_LIBRARIES)
    return {
        "command": " ".join(["ht-bench", *(shlex.quote(without_folders(argument)) for argument in arguments)]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "model": about.base_model["name"],
        "precision": about.precision,
        "device": cpu_name(settings.threads) if runs_on_cpu(about, settings.device) else gpu_name(),
        "engine": _engine(settings.engine, generator, settings.tree),
        "compared": {name: _engine(paths[name], other, None) for name, other in others.items()},
        "prompts": {
            "file": settings.prompts.name,
            "sha256": sha256_file(settings.prompts),
            "count": prompts,
            "tasks": list(settings.tasks) or "all",
        },
        "max_new_tokens": settings.max_new_tokens,
        "repeats": settings.repeats,
        "warm_up": settings.warm_up,
        "sampling": _sampling(settings),
        "without_ngrams_too": settings.without_ngrams,
        "transformers": settings.model and without_folders(settings.model),
        "transformers_precision": settings.model and "float32",
        "prompt_lookup": settings.prompt_lookup,
        **_further(settings),
        "versions": _versions(libraries),
    }


def _further(settings: BenchSettings) -> dict[str, Any]:
    """Return what further ways are measured; nothing where there are none, as files of earlier releases have it."""
    found: dict[str, Any] = {}
    if settings.text_drafts:
        found["text_drafts"] = True
    if settings.early_exit is not None:
        found["early_exit"] = settings.early_exit
    if settings.self_speculative is not None:
        about = SKIPPED_BLOCKS.read(settings.self_speculative)
        found["self_speculative"] = {
            "file": settings.self_speculative.name,
            "attention": about.attention,
            "mlp": about.mlp,
            "draft_tokens": about.draft_tokens,
            "confidence": about.confidence,
        }
    return found


def differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """Return which conditions differ, in words; when, and from which commit, does not count."""
    found = []
    for key in [*now, *(key for key in then if key not in now)]:
        one, other = now.get(key), then.get(key)
        if one == other or key in OF_ONE_RUN:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            found += [f"{one_line(key)}.{difference}" for difference in differences(one, other)]
        else:
            found.append(f"{one_line(key)} is {shown(other)} there and {shown(one)} now")
    return found


def continued(path: Path, now: dict[str, Any], then: dict[str, Any], *, goes_on: bool = True) -> dict[str, Any]:
    """Return the conditions of results at `path`, made under those of `then`, to which a run under `now` is to add:
    with its date and commit, if it `goes_on`. Raises `InputError` where the two differ.
    """
    if differing := differences(now, then):
        raise InputError(
            f"{path} holds results under other conditions: {one_line('; '.join(differing), MOST_TOLD)}; repeat the "
            "earlier command to continue it, or choose another --json"
        )
    earlier = {key: then.get(key) for key in ("date", "commit")}
    this = {key: now[key] for key in earlier}
    runs = then.get("continued", [])
    if goes_on and this not in [earlier, *runs]:
        runs = [*runs, this]
    return {**then, **({"continued": runs} if runs else {})}


def without_folders(argument: str) -> str:
    """Return a command-line argument with paths cut down to their last part; a hub id stays as it is."""
    parts = argument.split("=")
    return "=".join(Path(part).name if _is_path(part) else part for part in parts)


def _is_path(text: str) -> bool:
    path = Path(text)
    return len(path.parts) > 1 and (path.is_absolute() or len(path.parts) > 2 or path.parent.exists())


def commit() -> str | None:
    """Return the commit that is checked out, with "-dirty" where files differ from it; None outside a clone."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def gpu_name() -> str:
    """Return the name of the GPU that engines run on, as far as the driver's tool tells it."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "NVIDIA GPU"
    return next(iter(done.stdout.splitlines()), "NVIDIA GPU")


def _engine(path: Path, generator: Generator, tree: TreeSizes | None) -> dict[str, Any]:
    about = generator.about
    return {
        "file": path.name,
        "sha256": about.graph.sha256,
        "weights_sha256": about.weights and about.weights.sha256,
        # With what else belongs to the engine: the hashes of its other files.
        "description_sha256": sha256_file(engine_file_path(path)),
        "precision": about.precision,
        "transfer_layers": list(about.dims.transfer_layers),
        **_drafter(about.transfer),
        "tree": _tree(generator, tree),
    }


def _drafter(transfer: dict[str, Any]) -> dict[str, str]:
    """Return what drafts, where that is not transfer layers: files of earlier releases do not say it."""
    recipe = transfer.get("recipe")
    return {"drafter": "medusa"} if isinstance(recipe, dict) and recipe.get("drafter") == "medusa" else {}


def _tree(generator: Generator, fixed: TreeSizes | None) -> dict[str, Any]:
    """Return what sizes the trees of an engine have: those of its tuning, unless they are `fixed`, or it has none."""
    tuning = generator.tuning
    if fixed is None and tuning is not None:
        # As exact as in the file that keeps them: read from there they are the same.
        milliseconds = [[round(1e3 * float(seconds), 4) for seconds in row] for row in tuning.menu.seconds]
        menu = repr((tuning.menu.sizes, tuning.menu.contexts, milliseconds, tuning.rate, tuning.draft_value))
        # A quick one may have been measured for this run alone, where it cannot be kept.
        full = tuning.kind == "full"
        return {
            "adaptive": True,
            "tuning": tuning.kind,
            "menu": len(tuning.menu.sizes) if full else None,
            "menu_sha256": hashlib.sha256(menu.encode()).hexdigest() if full else None,
        }
    sizes = fixed or generator.about.tree
    return {"adaptive": False, "tree_rows": sizes.tree_rows, "pseudo_rows": list(sizes.pseudo_rows)}


def _sampling(settings: BenchSettings) -> dict[str, Any]:
    chosen = {name: getattr(settings.sampling, name) for name in SAMPLING_OPTIONS}
    return {**chosen, "seeds": [seed for seed in settings.seeds if seed is not None]}


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("hidden-transfer", "numpy", "tokenizers", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            # Another engine library does the work.
            continue
    return found
