"""`ht-bench`: measure an engine against plain decoding, `transformers` and other engines, and tune it to a device."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from runtime import program
from runtime.options import Parser, optional_imports

# Each subcommand's module, imported when it is asked for, and help. The module has add_options(parser), which also sets
# `work`, a function that is given the options and returns the exit status, and `interrupted`, the line for Ctrl-C.
SUBCOMMANDS = {
    "run": ("ht_export.bench.run", "speed and text against plain decoding, transformers and other engines"),
    "load": ("ht_export.bench.load.cli", "many requests at once: tokens/s, latencies, and every text against alone"),
    "peers": ("ht_export.bench.peers.cli", "beside llama.cpp, OpenVINO, ONNX Runtime GenAI and transformers"),
    "tune": ("ht_export.bench.tune", "measure steps on this device and find the sizes that pay"),
    "precisions": ("ht_export.bench.precisions", "size, speed and quality of one model's engines by precision"),
    "plan-weights": ("ht_export.bench.plan_weights", "an engine for the CPU with a quantised plan's weights"),
    "gpu": ("ht_export.bench.gpu.check", "check the kernel and engines on an NVIDIA GPU"),
    "kernel-resources": ("ht_export.bench.kernel_resources", "registers and shared memory of every compiled kernel"),
    "random-checkpoint": ("ht_export.bench.random_checkpoint", "write random weights in the shape of a real model"),
}


def build_parser(asked: str | None = None, *, every: bool = False) -> Parser:
    """Return the parser of `ht-bench`, with the options of the subcommand that is asked for, or of `every` one."""
    parser = Parser(
        prog="ht-bench",
        description=__doc__,
        epilog="example: ht-bench run engine.onnx --prompts prompts.jsonl --count 40 --json results.json",
        complete=lambda: build_parser(every=True),
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in SUBCOMMANDS.items():
        subcommand = commands.add_parser(name, help=summary)
        if name == asked:
            importlib.import_module(module).add_options(subcommand)
        elif every:
            with optional_imports():
                importlib.import_module(module).add_options(subcommand)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ht-bench` and return its exit status: 0; 1 for a wrong text, or with one line on stderr for a mistake."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    asked = next((argument for argument in given if not argument.startswith("-")), None)
    interrupted = "interrupted"

    def work() -> int:
        nonlocal interrupted
        options = build_parser(asked).parse_args(given)
        options.arguments = given
        interrupted = options.interrupted
        status: int = options.work(options)
        return status

    return program.run("ht-bench", work, interrupted=lambda: interrupted)


if __name__ == "__main__":
    sys.exit(main())
