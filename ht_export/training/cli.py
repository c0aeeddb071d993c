"""`ht-train`: make self-distillation text, fit transfer layers to it, measure them on held-out text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from runtime.command_line import add_model, integers, run


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `ht-train`."""
    parser = argparse.ArgumentParser(
        prog="ht-train",
        description=__doc__,
        epilog="example: ht-train data smollm2-135m --prompts prompts.jsonl --out data/ && "
        "ht-train fit smollm2-135m --data data/ --out transfer.safetensors",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_data(commands)
    _add_fit(commands)
    _add_eval(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ht-train` and return its exit status: 0, or 1 with one line on stderr for a user's mistake."""
    options = build_parser().parse_args(arguments)
    again = "interrupted; run the same command again to continue"
    return run("ht-train", lambda: options.run(options), interrupted=again)


def _add_data(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser(
        "data",
        help="generate the base model's own answers to a file of prompts",
        description="Generate the base model's greedy answers to a file of prompts. Killed at any point, the same "
        "command continues where it stopped.",
    )
    add_model(data)
    data.add_argument(
        "--prompts", type=Path, required=True, help="JSON lines with 'prompt', or 'turns' of which the first is used"
    )
    data.add_argument("--out", type=Path, required=True, help="folder for the shards and their manifest")
    data.add_argument("--max-prompts", type=int, help="use this many, drawn at random (default: all)")
    data.add_argument("--max-prompt-tokens", type=int, default=256, help="leave out longer prompts (default: 256)")
    data.add_argument("--max-new-tokens", type=int, default=128, help="length limit of an answer (default: 128)")
    data.add_argument("--batch-size", type=int, default=32, help="prompts answered together (default: 32)")
    data.add_argument("--seed", type=int, default=0, help="draws the prompts (default: 0)")
    _add_dtype(data, "float32")
    data.set_defaults(run=_run_data)


def _add_fit(commands: argparse._SubParsersAction) -> None:
    fit = commands.add_parser(
        "fit",
        help="train transfer layers on generated data",
        description="Train transfer layers by KL to the frozen base model's distribution at random anchors of its own "
        "text. Writes checkpoints; killed at any point, the same command continues and ends with the same weights.",
    )
    add_model(fit)
    fit.add_argument("--data", type=Path, required=True, help="folder made by ht-train data")
    fit.add_argument("--held-out", type=Path, help="another such folder, to measure acceptance on; never trained on")
    fit.add_argument("--out", type=Path, required=True, help="transfer-layers file to write (.safetensors)")
    fit.add_argument(
        "--layers",
        type=integers,
        help="transfer layer of each draft step, 0-based, the number of layers meaning the last one's output "
        "(default: 3 steps, all at two thirds of the depth)",
    )
    fit.add_argument("--steps", type=int, default=500, help="optimizer steps (default: 500)")
    fit.add_argument("--sequences", type=int, default=8, help="texts in a step (default: 8)")
    fit.add_argument("--anchors", type=int, default=64, help="anchors in a text (default: 64)")
    fit.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate (default: 0.002)")
    fit.add_argument("--seed", type=int, default=0, help="draws texts and anchors (default: 0)")
    fit.add_argument("--checkpoint", type=Path, help="checkpoint file (default: OUT with .checkpoint added)")
    fit.add_argument("--checkpoint-every", type=int, default=50, help="steps between checkpoints (default: 50)")
    fit.add_argument("--evaluate-every", type=int, default=100, help="steps between held-out displays (default: 100)")
    _add_dtype(fit, "bfloat16")
    fit.set_defaults(run=_run_fit)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    evaluation = commands.add_parser(
        "eval",
        help="measure transfer layers on held-out text",
        description="Print, as JSON, how often the base model's greedy token is in the draft's top 1/2/4/8 per step.",
    )
    add_model(evaluation)
    evaluation.add_argument("--transfer", type=Path, required=True, help="transfer-layers file")
    evaluation.add_argument("--data", type=Path, required=True, help="folder made by ht-train data")
    evaluation.set_defaults(run=_run_eval)


def _add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=default,
        help=f"of the base model's run (default: {default})",
    )


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


def _run_fit(options: argparse.Namespace) -> None:
    import torch

    from ht_export.checkpoint import load_base_model
    from ht_export.progress import progress_bar
    from ht_export.training.data import read_data
    from ht_export.training.evaluate import evaluate
    from ht_export.training.fit import FitSettings, fit
    from ht_export.transfer import TransferFile, save_transfer_layers
    from runtime.files import check_writable

    check_writable(options.out)
    base = load_base_model(options.model, getattr(torch, options.dtype))
    num_layers = base.model.config.num_hidden_layers
    layers = options.layers or (round(num_layers * 2 / 3),) * 3
    settings = FitSettings(
        layers=layers,
        steps=options.steps,
        sequences=options.sequences,
        anchors=options.anchors,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    data = read_data(options.data, base, len(layers) + 1)
    held_out = read_data(options.held_out, base, len(layers) + 1) if options.held_out else []
    with progress_bar() as progress:
        transfer = fit(
            base,
            data,
            settings,
            options.checkpoint or Path(f"{options.out}.checkpoint"),
            progress,
            held_out=held_out[:: max(1, len(held_out) // 40)],
            evaluate_every=options.evaluate_every,
            checkpoint_every=options.checkpoint_every,
            report=progress.console.print,
        )
        acceptance = evaluate(base, transfer, held_out, progress=progress) if held_out else {}
    tokens = sum(len(sequence.answer) for sequence in data)
    recipe = {
        **asdict(settings),
        "data": {"sequences": len(data), "answer_tokens": tokens},
        "dtype": options.dtype,
        "versions": {"hidden-transfer": version("hidden-transfer"), "torch": torch.__version__},
    }
    save_transfer_layers(options.out, transfer, TransferFile(base.identity(), recipe, acceptance))
    print(f"wrote {options.out}", file=sys.stderr)


def _run_eval(options: argparse.Namespace) -> None:
    from ht_export.attention import use_attention_rows
    from ht_export.checkpoint import load_base_model
    from ht_export.progress import progress_bar
    from ht_export.training.data import read_data
    from ht_export.training.evaluate import evaluate
    from ht_export.transfer import load_transfer_layers

    base = load_base_model(options.model)
    transfer, _ = load_transfer_layers(options.transfer, base.identity())
    data = read_data(options.data, base, transfer.num_steps + 1)
    use_attention_rows(base.model)
    with progress_bar() as progress:
        print(json.dumps(evaluate(base, transfer, data, progress=progress), indent=2))


if __name__ == "__main__":
    sys.exit(main())
