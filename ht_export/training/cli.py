"""`ht-train`: make self-distillation text, fit transfer layers to it, measure them, and find where they belong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ht_export.training.recipe.options import add_all, add_report
from runtime.errors import InputError
from runtime.options import Parser
from runtime.program import add_adapter, add_model, integers, pathname, run

PLACEMENT_HELP = (
    "transfer layer of each draft step, 0-based, the number of layers meaning the last one's output; as many numbers "
    "as draft steps (default: 3 steps, all at two thirds of the depth)"
)

DATA_HELP = "folders made by ht-train data; several are trained on together, such as greedy and sampled text"


def build_parser() -> Parser:
    """Return the parser of `ht-train`."""
    parser = Parser(
        prog="ht-train",
        description=__doc__,
        epilog="example: ht-train all smollm2-135m --prompts prompts.jsonl --out transfer.safetensors; "
        "docs/training.md walks through it, and through its stages one by one",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_all(commands)
    _add_data(commands)
    _add_merge(commands)
    _add_fit(commands)
    _add_draft_head(commands)
    _add_eval(commands)
    _add_sweep(commands)
    add_report(commands)
    _add_skip_blocks(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ht-train` and return its exit status: 0, or 1 with one line on stderr for a user's mistake."""
    interrupted = "interrupted"

    def work() -> None:
        nonlocal interrupted
        options = build_parser().parse_args(arguments)
        if options.command not in ("eval", "draft-head", "merge", "report", "skip-blocks"):
            interrupted = "interrupted; run the same command again to continue"
        # Imports torch and transformers, which --help and a mistyped option should not wait for.
        import torch

        try:
            _run(options)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the GPU's memory is used up ({error}); lower --sequences or --anchors, or use --device cpu"
            ) from error

    return run("ht-train", work, interrupted=lambda: interrupted)


def _run(options: argparse.Namespace) -> None:
    """Run one command."""
    from ht_export.training import commands
    from ht_export.training.recipe import report
    from ht_export.training.recipe import run as recipe

    if options.command == "all":
        # Its stages are commands too.
        recipe.run_all(options, lambda words: _run(build_parser().parse_args(words)))
    elif options.command == "report":
        report.run_report(options)
    else:
        getattr(commands, f"run_{options.command.replace('-', '_')}")(options)


def _add_data(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser(
        "data",
        help="generate the base model's own answers to a file of prompts",
        description="Generate the base model's own answers to a file of prompts, greedy unless --temperature is given. "
        "An engine of the model answers many at once, exported first if MODEL is not one already. Killed at any point, "
        "the same command continues where it stopped.",
    )
    data.add_argument(
        "model", help="known name (smollm2-135m), Hugging Face folder, .gguf file, hub id, or an engine of the model"
    )
    add_adapter(data)
    data.add_argument(
        "--prompts",
        type=pathname,
        required=True,
        help="JSON lines with 'prompt' (a string) or 'turns' (a list of strings)",
    )
    data.add_argument(
        "--exclude", type=pathname, help="another such file; prompts that begin as one of it are left out"
    )
    data.add_argument("--out", type=pathname, required=True, help="folder for the shards and their manifest")
    data.add_argument("--max-prompts", type=int, help="use this many, drawn at random (default: all)")
    data.add_argument("--max-turns", type=int, default=1, help="turns of a conversation to answer (default: 1)")
    data.add_argument("--max-prompt-tokens", type=int, default=256, help="leave out longer prompts (default: 256)")
    data.add_argument("--max-new-tokens", type=int, default=128, help="length limit of an answer (default: 128)")
    data.add_argument("--temperature", type=float, default=0.0, help="sample at this temperature (default: 0, greedy)")
    data.add_argument("--top-k", type=int, default=0, help="sample from the k most probable tokens (default: 0, all)")
    data.add_argument("--top-p", type=float, default=1.0, help="sample from this much probability (default: 1, all)")
    data.add_argument("--batch-size", type=int, default=32, help="prompts answered at once (default: 32)")
    data.add_argument("--shard-size", type=int, default=64, help="answers in a file (default: 64)")
    data.add_argument("--seed", type=int, default=0, help="draws prompts and samples (default: 0)")
    data.add_argument("--part", type=_part, metavar="I/N", help="answer the I-th of N parts, on one of N machines; "
                      "ht-train merge puts them together (default: all)")  # fmt: skip
    data.add_argument("--precision", choices=("fp32", "int8"), help="of the engine that is exported; int8 is faster, "
                      "and its text not quite the model's (default: fp32)")  # fmt: skip
    data.add_argument("--transfer", type=pathname, help="transfer layers of that engine, for speed alone (default: "
                      "those shipped for a known model, else untrained ones)")  # fmt: skip
    data.add_argument("--threads", type=int, help="threads on the CPU (default: one for each core)")
    data.add_argument("--device", help="where an ONNX engine runs: cpu, cuda or cuda:1 (default: cpu)")


def _add_merge(commands: argparse._SubParsersAction) -> None:
    merge = commands.add_parser(
        "merge",
        help="put together the parts of data that several machines have made",
        description="Put together folders that ht-train data --part has made, one of each part, with the same prompts "
        "and settings.",
    )
    merge.add_argument("parts", type=pathname, nargs="+", help="the folders of all parts")
    merge.add_argument("--out", type=pathname, required=True, help="folder to write")


def _add_fit(commands: argparse._SubParsersAction) -> None:
    fit = commands.add_parser(
        "fit",
        help="train transfer layers on generated data",
        description="Train transfer layers by KL to the frozen base model's distribution at random anchors of its own "
        "text, from a start in closed form. Writes checkpoints; killed at any point, the same command continues and "
        "ends with the same weights. On several GPUs: accelerate launch -m ht_export.training.cli fit ...",
    )
    add_model(fit)
    add_adapter(fit)
    fit.add_argument("--data", type=pathname, nargs="+", required=True, help=DATA_HELP)
    fit.add_argument(
        "--held-out", type=pathname, help="another such folder, to measure acceptance on; never trained on"
    )
    fit.add_argument("--max-texts", type=int, help="train on this many of the texts, spread evenly (default: all)")
    fit.add_argument("--out", type=pathname, required=True, help="transfer-layers file to write (.safetensors)")
    fit.add_argument("--layers", type=integers, help=PLACEMENT_HELP)
    fit.add_argument("--drafter", choices=("transfer", "medusa"), help="what is trained: transfer layers, or "
                     "heads of Medusa-1, to compare them with (default: transfer, or what --start has)")  # fmt: skip
    beginning = fit.add_mutually_exclusive_group()
    _add_init(beginning)
    beginning.add_argument("--start", type=pathname, help="begin with these transfer layers, to train them further; "
                           "their layers and correction rank are the default then; --layers may name more behind "
                           "theirs, to train more draft steps, and --correction-rank a greater one")  # fmt: skip
    fit.add_argument("--steps", type=int, default=500, help="optimizer steps (default: 500)")
    _add_batches(fit)
    _add_loss(fit)
    fit.add_argument("--draft-prompts", type=pathname, help="with --draft-size or --loss-size, file of prompts whose "
                     "tokens come next after those of the answers: words that so few answers do not have "
                     "(default: none)")  # fmt: skip
    fit.add_argument("--patience", type=int, default=0, help="stop after so many held-out measurements in a row that "
                     "bring nothing, and keep the best weights (default: 0, never)")  # fmt: skip
    fit.add_argument("--checkpoint", type=pathname, help="checkpoint file (default: OUT with .checkpoint added)")
    fit.add_argument("--checkpoint-every", type=int, default=50, help="steps between checkpoints (default: 50)")
    fit.add_argument("--evaluate-every", type=int, default=100, help="steps between held-out measurements "
                     "(default: 100)")  # fmt: skip
    fit.add_argument("--evaluate-texts", type=int, default=40, help="held-out texts of such a measurement; all are "
                     "measured at the end (default: 40)")  # fmt: skip
    fit.add_argument("--log", type=pathname, help="folder for TensorBoard logs (default: none)")
    _add_machine(fit, "bfloat16")


def _add_draft_head(commands: argparse._SubParsersAction) -> None:
    head = commands.add_parser(
        "draft-head",
        help="let drafts of trained transfer layers be chosen from the most useful tokens only",
        description="Choose the tokens that drafts are chosen from: the stop tokens, and those that are most frequent "
        "in the base model's own text. Pseudo rows are read by their rows of the head alone, which is faster; no draft "
        "is of another token, and the text stays the base model's. ht-train fit --draft-size does it before it trains.",
    )
    add_model(head)
    add_adapter(head)
    head.add_argument("--data", type=pathname, nargs="+", required=True, help=DATA_HELP)
    head.add_argument("--prompts", type=pathname, help="file of prompts, whose tokens come next after those of the "
                      "answers: words that so few answers do not have (default: none)")  # fmt: skip
    head.add_argument("--size", type=int, default=8192, help="tokens to choose from (default: 8192)")
    head.add_argument("--transfer", type=pathname, required=True, help="transfer-layers file to begin with")
    head.add_argument("--out", type=pathname, required=True, help="transfer-layers file to write (.safetensors)")
    head.add_argument("--held-out", type=pathname, help="another such folder, to measure acceptance on (default: none; "
                      "what was measured before is left out)")  # fmt: skip
    _add_machine(head, "float32")


def _add_eval(commands: argparse._SubParsersAction) -> None:
    evaluation = commands.add_parser(
        "eval",
        help="measure transfer layers on held-out text",
        description="Measure, on the base model's own text: top-1/2/4/8 and KL by draft step, rank-wise acceptance, "
        "calibration, and tokens per step by tree rows. Prints JSON.",
    )
    add_model(evaluation)
    add_adapter(evaluation)
    evaluation.add_argument("--transfer", type=pathname, required=True, help="transfer-layers file")
    evaluation.add_argument("--data", type=pathname, required=True, help="folder made by ht-train data")
    evaluation.add_argument("--out", type=pathname, help="folder for eval.json and plots as PNG files (default: none)")
    evaluation.add_argument("--tree-rows", type=int, help="also simulate this tree (default: the export's default)")
    evaluation.add_argument("--pseudo-rows", type=integers, help="its pseudo rows by draft step")
    evaluation.add_argument("--store", action="store_true", help="put the statistics into the transfer-layers file")
    _add_machine(evaluation, "float32")


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="find the best transfer layers and number of draft steps for a cost of rows",
        description="Compare placements by successive halving: short fits of all, longer ones of the better half. "
        "Prints a table and a recommendation; writes sweep.json, sweep.md and sweep.png. Killed at any point, the same "
        "command continues.",
    )
    add_model(sweep)
    add_adapter(sweep)
    sweep.add_argument("--data", type=pathname, nargs="+", required=True, help=DATA_HELP)
    sweep.add_argument("--held-out", type=pathname, required=True, help="another such folder, to measure acceptance on")
    sweep.add_argument("--out", type=pathname, required=True, help="folder for results and checkpoints")
    sweep.add_argument("--row-cost", type=float, default=0.05, help="cost of one more row in a pass, in plain passes; "
                       "compare passes of two engines or trees (default: 0.05, a CPU with few cores)")  # fmt: skip
    sweep.add_argument("--draft-steps", type=int, default=3, help="draft steps to train; fewer are compared too "
                       "(default: 3)")  # fmt: skip
    sweep.add_argument("--placement", type=integers, action="append", dest="placements", metavar="LAYERS",
                       help="compare this placement, such as 20,20,20; repeat for more (default: shared layers at 1/3, "
                       "1/2, 2/3, 5/6 and all of the depth, and two staggered ones)")  # fmt: skip
    sweep.add_argument("--steps", type=int, default=200, help="optimizer steps of the finalists (default: 200)")
    sweep.add_argument("--rungs", type=int, default=3, help="times that the field is measured (default: 3)")
    sweep.add_argument("--evaluate-texts", type=int, default=40, help="held-out texts to measure on (default: 40)")
    _add_init(sweep)
    _add_batches(sweep)
    _add_loss(sweep)
    _add_machine(sweep, "bfloat16")


def _add_skip_blocks(commands: argparse._SubParsersAction) -> None:
    skip = commands.add_parser(
        "skip-blocks",
        help="find the blocks that self-speculative decoding drafts best without, to compare with it",
        description="Search the attention and MLP blocks that the model drafts best without (self-speculative "
        "decoding, arXiv 2309.08168) on its own greedy text: each alone, sets that grow, then random changes of the "
        "best. Writes the file that ht-bench run --self-speculative takes. Killed at any point, the same command "
        "continues, from a checkpoint beside that file; with a larger --budget, also when it had ended.",
    )
    add_model(skip)
    add_adapter(skip)
    skip.add_argument("--data", type=pathname, nargs="+", required=True, help=DATA_HELP)
    skip.add_argument("--out", type=pathname, required=True, help="file to write (.json)")
    skip.add_argument("--texts", type=int, default=8, help="answers to evaluate each set on, evenly from the data "
                      "(default: 8)")  # fmt: skip
    skip.add_argument("--budget", type=int, default=240, help="sets to evaluate (default: 240)")
    skip.add_argument("--row-cost", type=float, default=0.05, help="cost of one more row in a pass, in plain passes "
                      "(default: 0.05, a CPU with few cores)")  # fmt: skip
    skip.add_argument("--draft-tokens", type=int, help="tokens drafted in a row (default: what is best)")
    skip.add_argument("--confidence", type=float, help="a token less sure ends a draft (default: what is best)")
    skip.add_argument("--seed", type=int, default=0, help="draws the changes (default: 0)")
    _add_machine(skip, "float32")


def _add_init(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--init", choices=("ridge", "identity"),
                        help="start from ridge regression on the base model's states, or from the identity "
                        "(default: ridge)")  # fmt: skip


def _add_batches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sequences", type=int, default=8, help="texts in a batch (default: 8)")
    parser.add_argument("--anchors", type=int, default=64, help="anchors in a text (default: 64)")
    parser.add_argument("--feature-cache", type=pathname, help="folder that keeps the base model's states of the data, "
                        "so that the base model runs over it once; large, see docs/training.md")  # fmt: skip
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step, shared among the processes "
                        "(default: 1)")  # fmt: skip
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate (default: 0.002)")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw",
                        help="muon takes Muon for the maps and AdamW for the rest (default: adamw)")  # fmt: skip
    parser.add_argument(
        "--correction-rank",
        type=int,
        help="rank of the token correction, which conditions drafts on the token before (default: 128; 0 for none)",
    )
    parser.add_argument("--draft-size", type=int, help="choose drafts from so many tokens, the most frequent of the "
                        "data, as ht-train draft-head does (default: the whole vocabulary)")  # fmt: skip
    parser.add_argument("--loss-size", type=int, help="have the loss run over so many tokens alone, the most frequent "
                        "of the data, and choose drafts from the whole vocabulary: steps take less time where that "
                        "is large (default: the whole vocabulary)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="draws texts and anchors (default: 0)")


def _add_loss(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step-weights", type=_numbers, help="weight of each draft step's loss (default: all 1)")
    parser.add_argument("--loss-temperature", type=float, default=1.0, help="softens both distributions (default: 1)")
    parser.add_argument("--loss-top-k", type=int, default=0, help="count only the base model's k most probable tokens "
                        "(default: 0, all)")  # fmt: skip
    parser.add_argument("--loss-choice", type=float, default=0.0, metavar="SHARE", help="of what drafts learn, the "
                        "share that is the base model's most probable token alone, for layers that serve greedy "
                        "decoding (default: 0, its distribution)")  # fmt: skip


def _add_machine(parser: argparse.ArgumentParser, dtype: str) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=dtype,
                        help=f"of the base model's run (default: {dtype})")  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="where the base model runs (default: auto, a GPU when there is one)")  # fmt: skip


def _part(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isascii() and number.isdigit() and of.isascii() and of.isdigit() and len(text) < 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 1/4, the first of four")
    return int(number), int(of)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,0.8,0.6") from None


if __name__ == "__main__":
    sys.exit(main())
