"""`ht-bench`: measure an engine against plain decoding, `transformers` and other engines, and tune it to a device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ht_export.bench import run, tune
from runtime import program

# Each has add_parser(commands), which sets `work`, what the subcommand does with its options: it returns the exit
# status; and `interrupted`, the line for Ctrl-C. Importing them loads neither an engine library nor torch.
SUBCOMMANDS = (run, tune)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `ht-bench`."""
    parser = argparse.ArgumentParser(
        prog="ht-bench",
        description=__doc__,
        epilog="example: ht-bench run engine.onnx --prompts prompts.jsonl --count 40 --json results.json",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ht-bench` and return its exit status: 0; 1 for a wrong text, or with one line on stderr for a mistake."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = build_parser().parse_args(given)
    options.arguments = given
    statuses: list[int] = []
    mistake = program.run("ht-bench", lambda: statuses.append(options.work(options)), interrupted=options.interrupted)
    return mistake or sum(statuses)


if __name__ == "__main__":
    sys.exit(main())
