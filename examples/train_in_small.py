"""Train transfer layers in small: the model's own answers, a short fit, an engine with it, and its text.

A real run has thousands of prompts and hundreds of steps (docs/training.md); this one shows that it works in a minute
or two, and is resumed where it was stopped.

python examples/train_in_small.py smollm2-135m work/
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ht_export.cli import main as ht_export
from ht_export.training.cli import main as ht_train
from runtime.cli import main as ht_generate

PROMPTS = (
    "Why is the sky blue?",
    "Name three uses of a brick.",
    "Write a sentence about the sea.",
    "What is a prime number?",
    "How does a bicycle stay upright?",
    "Give me a recipe for pancakes.",
    "What do bees make?",
    "Tell me about the moon.",
)


def main(arguments: Sequence[str]) -> int:
    """Train for the model named, in the folder named; return the exit status of the first command that fails."""
    model, folder = arguments[0], Path(arguments[1])
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    data, transfer, engine = (str(folder / name) for name in ("data", "transfer.safetensors", "engine.onnx"))
    small = ["--max-new-tokens", "48"]
    fit = ["--steps", "20", "--sequences", "2", "--anchors", "16"]
    commands = (
        lambda: ht_train(["data", model, "--prompts", str(prompts), "--out", data, *small]),
        lambda: ht_train(["fit", model, "--data", data, "--out", transfer, *fit]),
        lambda: ht_export([model, "--transfer", transfer, "--out", engine]),
        lambda: ht_generate([engine, "What do cows eat?", "--max-new-tokens", "32"]),
    )
    return next((status for command in commands if (status := command())), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
