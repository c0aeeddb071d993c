"""The options of `ht-train all` and `ht-train report`."""

from __future__ import annotations

import argparse

from runtime.program import add_adapter, add_model, integers, pathname


def add_all(commands: argparse._SubParsersAction) -> None:
    """Add `ht-train all`."""
    every = commands.add_parser(
        "all",
        help="do all of it: data, fit, evaluation and a report, from a model and a file of prompts",
        description="Make transfer layers for a model from a file of prompts: the model answers them, transfer layers "
        "are fitted and measured, and a report says what they are worth here. What nobody says follows the model and "
        "this machine. The command of every stage is printed. Killed at any point, the same command continues.",
        epilog="example: ht-train all ./my-model --prompts prompts.jsonl --out transfer.safetensors --hours 3",
    )
    add_model(every)
    add_adapter(every)
    every.add_argument("--prompts", type=pathname, required=True,
                       help="JSON lines with 'prompt' (a string) or 'turns' (a list of strings)")  # fmt: skip
    every.add_argument("--out", type=pathname, required=True, help="transfer-layers file to write (.safetensors)")
    every.add_argument("--held-out", type=pathname, help="another such file, to measure on; never trained on (default: "
                       "5 %% of the prompts, at most 200, drawn at random)")  # fmt: skip
    every.add_argument("--work", type=pathname, help="folder for all that is made on the way, and the report (default: "
                       "OUT with .work added)")  # fmt: skip
    length = every.add_mutually_exclusive_group()
    length.add_argument("--hours", type=float, help="time for fitting; the steps follow from this machine's pace "
                        "(default: 2)")  # fmt: skip
    length.add_argument("--steps", type=int, help="optimizer steps, in the place of --hours")
    every.add_argument("--curve", action="store_true", help="fit half and a quarter of the texts too, to tell what "
                       "more would bring; the time is shared")  # fmt: skip
    every.add_argument("--max-prompts", type=int, help="train on this many, drawn at random (default: all)")
    every.add_argument("--max-prompt-tokens", type=int, help="leave out longer prompts (default: 256)")
    every.add_argument("--max-new-tokens", type=int, default=128, help="length limit of an answer (default: 128)")
    every.add_argument("--layers", type=integers, help="transfer layer of each draft step, 0-based (default: all at "
                       "two thirds of the depth)")  # fmt: skip
    every.add_argument("--draft-steps", type=int, help="number of draft steps (default: 3 on a CPU, 4 on a GPU)")
    every.add_argument("--draft-size", type=int, help="choose drafts from so many tokens; 0 for the whole vocabulary "
                       "(default: 16384 where the model's head is at least a quarter of it, else 0)")  # fmt: skip
    every.add_argument("--precision", choices=("fp32", "int8"), help="of the engine that answers the prompts (default: "
                       "fp32, int8 from a billion weights on)")  # fmt: skip
    every.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the base model in the fit (default: "
                       "bfloat16 where the device computes in it, else float32)")  # fmt: skip
    every.add_argument("--sequences", type=int, help="texts in a batch (default: 8, fewer where memory is short)")
    every.add_argument("--anchors", type=int, help="anchors in a text (default: 64, fewer where memory is short)")
    every.add_argument("--batch-size", type=int, help="prompts answered at once (default: 32)")
    every.add_argument("--seed", type=int, default=0, help="draws prompts, texts and anchors (default: 0)")
    every.add_argument("--threads", type=int, help="threads of the engine on the CPU (default: one for each core)")
    _add_device(every)


def add_report(commands: argparse._SubParsersAction) -> None:
    """Add `ht-train report`."""
    report = commands.add_parser(
        "report",
        help="write a report of trained transfer layers",
        description="Write what transfer layers are worth, as Markdown with plots and as JSON: acceptance, the "
        "speed-up to expect, and what more data would bring. It is the last stage of ht-train all.",
    )
    add_model(report)
    add_adapter(report)
    report.add_argument("--transfer", type=pathname, required=True, help="transfer-layers file")
    report.add_argument("--data", type=pathname, required=True, help="folder of the texts that it was trained on")
    report.add_argument("--held-out", type=pathname, required=True, help="folder of other texts")
    report.add_argument("--out", type=pathname, required=True, help="folder for report.md, report.json and plots")
    report.add_argument("--log", type=pathname, help="folder that ht-train fit --log wrote (default: no course)")
    report.add_argument("--engine", type=pathname, help="engine whose passes were timed here, for the cost of a row")
    report.add_argument("--row-cost", type=float, help="cost of one more row, in plain passes (default: that of "
                        "--engine, else 0.05)")  # fmt: skip
    report.add_argument("--curve", type=pathname, nargs="+", default=[], metavar="FILE", help="transfer layers of fits "
                        "to fewer texts")  # fmt: skip
    report.add_argument("--texts", type=int, default=60, help="texts of either kind that are compared (default: 60)")
    report.add_argument("--threads", type=int, help="threads that the engine was timed with (default: one for each "
                        "core)")  # fmt: skip
    _add_device(report)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="where the base model runs (default: auto, a GPU when there is one)")  # fmt: skip
