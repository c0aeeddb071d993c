"""`ht-export`: an engine from a base model and its transfer layers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from runtime.command_line import add_model, integers, run


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `ht-export`."""
    parser = argparse.ArgumentParser(
        prog="ht-export",
        description="Export a base model with its transfer layers to one engine file for runtime.Generator and "
        "ht-generate. Beside ENGINE.onnx it writes the weights (ENGINE.onnx.data), the description (ENGINE.json), the "
        "tokenizer and the chat template; keep them together.",
        epilog="example: ht-export smollm2-135m --out engine.onnx",
    )
    add_model(parser)
    parser.add_argument(
        "--transfer", type=Path, metavar="FILE", help="transfer layers (default: those shipped for a known model)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="ENGINE", help="engine file to write (.onnx)")
    parser.add_argument(
        "--tree-rows", type=int, metavar="T", help="default number of candidates verified in a pass (default: 4)"
    )
    parser.add_argument(
        "--pseudo-rows",
        type=integers,
        metavar="R1,R2,...",
        help="default number of pseudo rows of each draft step (default: T, then half as many)",
    )
    parser.add_argument(
        "--prompt-chunk", type=int, default=256, metavar="N", help="prompt tokens in a pass (default: 256)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ht-export` and return its exit status: 0, or 1 with one line on stderr for a user's mistake."""
    options = build_parser().parse_args(arguments)
    return run("ht-export", lambda: _export(options), interrupted="interrupted; nothing was written")


def _export(options: argparse.Namespace) -> None:
    from ht_export.export import ExportSettings, export
    from ht_export.progress import stage_display

    with stage_display() as display:

        @contextmanager
        def stage(description: str) -> Iterator[None]:
            task = display.add_task(description, total=1)
            yield
            display.update(task, completed=1)

        settings = ExportSettings(options.tree_rows, options.pseudo_rows, options.prompt_chunk)
        description = export(options.model, options.transfer, options.out, settings, stage)
    size = (description.graph.bytes + description.weights.bytes) / 2**20
    difference = description.parity["largest_relative_difference"]
    print(f"done: {options.out}, {size:.0f} MiB, within {difference:.1e} of the PyTorch reference", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
