"""The command line of `ht-parity`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtime import program
from runtime.errors import InputError
from runtime.options import Parser

if TYPE_CHECKING:
    from ht_export.parity.report import Report

REPORT_SUFFIXES = (".md", ".html")


def build_parser() -> Parser:
    """Return the parser of `ht-parity`."""
    parser = Parser(
        prog="ht-parity",
        description="Compare an engine with its base model stage by stage: transformers, the PyTorch reference, ONNX's "
        "reference evaluator, ONNX Runtime (and the graph lowered for the CPU), or TensorRT. Names the layer where the "
        "first difference beyond rounding is. Then answers prompts greedily and says where texts part, and whether "
        "rounding explains it. Exits with 1 when something does not hold.",
        epilog="example: ht-parity smollm2-135m engine.onnx --prompts prompts.jsonl --count 10 --report parity.html",
    )
    program.add_model(parser)
    program.add_adapter(parser)
    parser.add_argument("engine", type=program.pathname, help="engine file made by ht-export (.onnx or .plan)")
    parser.add_argument(
        "--transfer",
        type=program.pathname,
        metavar="FILE",
        help="transfer layers of the engine (default: as ht-export takes them)",
    )
    parser.add_argument(
        "--prompts",
        type=program.pathname,
        metavar="FILE",
        help="JSONL file as ht-train reads it (default: three prompts of ours)",
    )
    parser.add_argument("--count", type=int, metavar="N", help="so many prompts, evenly from the file (default: 10)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="of each answer (default: 64); 0 answers none"
    )
    parser.add_argument("--per-layer", action="store_true", help="show every layer's differences")
    parser.add_argument(
        "--no-evaluator", action="store_true", help="leave out ONNX's reference evaluator, which is slow"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of the engine on the CPU (default: all cores)")
    parser.add_argument("--report", type=program.pathname, metavar="FILE", help="write the report here (.md or .html)")
    parser.add_argument("--json", type=program.pathname, metavar="FILE", help="write all numbers here")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ht-parity` and return its exit status: 0 where parity holds, else 1; 1 with one line for a mistake."""
    return program.run(
        "ht-parity",
        lambda: _run(build_parser().parse_args(arguments)),
        interrupted="interrupted; nothing was written",
    )


def _run(options: argparse.Namespace) -> int:
    from runtime.bundle.placing import check_apart
    from runtime.files import check_writable

    for path in (options.report, options.json):
        if path:
            check_writable(path)
            check_apart(path, [options.engine], [options.transfer, options.prompts])
    if options.report and options.report.suffix not in REPORT_SUFFIXES:
        raise InputError(f"--report {options.report}: its name must end in {' or '.join(REPORT_SUFFIXES)}")
    from ht_export.parity.report import to_markdown
    from ht_export.parity.run import ParitySettings, run
    from ht_export.progress import stage_display

    settings = ParitySettings(
        options.model,
        options.engine,
        options.transfer,
        options.prompts,
        options.count,
        options.max_new_tokens,
        not options.no_evaluator,
        options.threads,
        tuple(options.adapters),
    )
    with stage_display() as stage:
        report = run(settings, stage)
    _write(report, options)
    program.say(to_markdown(report, options.per_layer).removesuffix("\n"))
    return 1 if report.faults else 0


def _write(report: Report, options: argparse.Namespace) -> None:
    from ht_export.parity.report import to_html, to_markdown
    from runtime.files import atomic_path, write_json

    if options.report:
        text = (to_html if options.report.suffix == ".html" else to_markdown)(report, options.per_layer)
        with atomic_path(options.report) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if options.json:
        write_json(options.json, report.to_dict(options.per_layer))


if __name__ == "__main__":
    sys.exit(main())
