"""`ht-train`: make self-distillation text, fit transfer layers to it, measure them on held-out text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `ht-train`."""
    parser = argparse.ArgumentParser(prog="ht-train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_data(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ht-train` and return its exit status: 0, or 1 with one line on stderr for a user's mistake."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except InputError as error:
        print(f"ht-train: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ht-train: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def _add_data(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser("data", help="generate the base model's own answers to a file of prompts")
    data.add_argument("model")
    data.add_argument("--prompts", type=Path, required=True)
    data.add_argument("--out", type=Path, required=True)
    data.add_argument("--max-prompts", type=int)
    data.add_argument("--max-prompt-tokens", type=int, default=256)
    data.add_argument("--max-new-tokens", type=int, default=128)
    data.add_argument("--batch-size", type=int, default=32)
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    data.set_defaults(run=_run_data)


def _run_data(options: argparse.Namespace) -> None:
    import torch

    from ht_export.checkpoint import load_base_model
    from ht_export.progress import progress_bar
    from ht_export.training.data import DataSettings, generate_data

    settings = DataSettings(
        max_prompts=options.max_prompts,
        max_prompt_tokens=options.max_prompt_tokens,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    base = load_base_model(options.model, getattr(torch, options.dtype))
    with progress_bar() as progress:
        generate_data(base, options.prompts, options.out, settings, progress)


if __name__ == "__main__":
    sys.exit(main())
