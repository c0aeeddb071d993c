"""The models and engines of a day: exported where they are needed, and kept for what comes after."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ht_export.gpu_day.settings import DaySettings, NotHereError

# Characters of a failure's words that are kept, the last ones.
WORDS = 4000


def command(words: list[str], seconds: float) -> dict[str, Any]:
    """Run a module of this project in a process of its own; return its words and seconds. Raises `RuntimeError` with
    what it said when it fails or takes too long.
    """
    begun = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *words], capture_output=True, text=True, timeout=max(1.0, seconds), check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(words)} was stopped after {seconds:.0f} s") from error
    said = (done.stdout + done.stderr)[-WORDS:]
    if done.returncode:
        raise CommandError(f"{' '.join(words)} ended with status {done.returncode}: {said}")
    return {"command": " ".join(words), "seconds": round(time.monotonic() - begun, 1), "said": said}


class CommandError(Exception):
    """A command of this project failed; the message has all that it said."""


def fp32_engine(settings: DaySettings) -> Path:
    """Return where the engine is, or will be, that others are compared with."""
    return settings.work / "fp32" / "engine.onnx"


def exported(settings: DaySettings) -> Path:
    """Return the fp32 engine, exported unless it is there."""
    path = fp32_engine(settings)
    if not path.with_suffix(".json").is_file():
        check_weights(settings)
        command(export_words(settings, path), settings.seconds_left())
    return path


def export_words(settings: DaySettings, path: Path, *options: str) -> list[str]:
    """Return the command that exports the model to `path`."""
    from ht_export.model.known import KNOWN_MODELS

    path.parent.mkdir(parents=True, exist_ok=True)
    drafts = [] if settings.model in KNOWN_MODELS else ["--random-transfer"]
    return ["ht_export.cli", settings.model, "--out", str(path), *drafts, *options]


def check_weights(settings: DaySettings) -> None:
    """Raise `NotHereError` where the model's weights are not on this machine."""
    import importlib.util

    from ht_export.model.known import KNOWN_MODELS

    known = KNOWN_MODELS.get(settings.model)
    if known is not None and importlib.util.find_spec(known.package) is None:
        raise NotHereError(f"the weights of {settings.model} are not here: carry all loads of the kit")
    for name in ("msgspec", "transformers", "tokenizers", "safetensors", "gguf"):
        if importlib.util.find_spec(name) is None:
            raise NotHereError(f"{name} is not installed here, nor carried")


def reference_model(settings: DaySettings, dtype: str) -> tuple[Any, Path]:
    """Return the PyTorch reference on the device, on a GPU with our kernel, on a CPU in float32; and the files of an
    engine that it is opened with, which need no export.
    """
    import torch

    from ht_export.bench.gpu.compiled import Kernel
    from ht_export.bench.gpu.torch_bundle import write_bundle
    from ht_export.bench.gpu.torch_engine import TREE_ROWS, reference_attention
    from ht_export.gpu_day.kernels import every_key, held_kernels
    from ht_export.model.attention import tree_attention
    from ht_export.model.checkpoint import load_base_model
    from ht_export.model.known import KNOWN_MODELS
    from ht_export.model.reference import HiddenTransferModel
    from ht_export.model.shipped import UNTRAINED, shipped_transfer, transfer_layers
    from runtime.tree import TreeSizes

    check_weights(settings)
    kind = torch.float32 if settings.rehearsal else getattr(torch, dtype)
    base = load_base_model(settings.model, kind)
    chosen = shipped_transfer(settings.model) if settings.model in KNOWN_MODELS else UNTRAINED
    transfer, about = transfer_layers(chosen, base)
    path = settings.work / "reference" / "engine.torch"
    if not path.with_suffix(".json").is_file():
        rows = 4 if settings.rehearsal else TREE_ROWS
        write_bundle(base, transfer, about, TreeSizes(rows, (rows,) * transfer.num_steps), path)
    attention: Any = tree_attention
    if not settings.rehearsal:
        torch.zeros(1, device="cuda")
        held = held_kernels(
            settings.kit / "kernels", every_key(), torch.cuda.get_device_capability(), compile_others=False
        )
        attention = reference_attention(Kernel(held))
    model = HiddenTransferModel(base.model, transfer.to(kind), attention)
    return model.to(settings.device).requires_grad_(False), path


def reference_generator(settings: DaySettings, dtype: str, **options: Any) -> Any:
    """Return decoding by the PyTorch reference."""
    from ht_export.bench.gpu.torch_engine import TorchGenerator

    model, path = reference_model(settings, dtype)
    return TorchGenerator(path, model, **options)


def dtypes(settings: DaySettings) -> tuple[str, ...]:
    """Return the types that passes are computed in."""
    return ("float32",) if settings.rehearsal else ("float16", "bfloat16")
