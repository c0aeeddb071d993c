"""The command line of `scripts/gpu_day.py`."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ht_export.gpu_day import packing
from ht_export.gpu_day.machine import describe
from ht_export.gpu_day.packing import PackSettings, pack, take_in
from ht_export.gpu_day.pieces import MEBIBYTE
from ht_export.gpu_day.results import FAILED, DayResults, state_of
from ht_export.gpu_day.running import Outcome, run_stages
from ht_export.gpu_day.settings import DaySettings
from ht_export.gpu_day.stages import PARTS, STAGES, chosen
from ht_export.gpu_day.training import kept_files, restore
from runtime.errors import InputError
from runtime.program import run as run_program
from runtime.program import say

DESCRIPTION = """
Make the most of a machine with an NVIDIA GPU that is there for a short time and has no network: whether the kernel is
right and how fast, how long steps take, training at scale, plans, and decoding from end to end.

`pack` writes what such a machine lacks, in loads of a size that can be carried at a time. `run` does the parts there,
in order of value, each in a process of its own and within the time there is; results are written after everything that
is found, and the same command goes on where it stopped. Parts 1 and 3 need no kit: torch and Triton, with what torch
brings.
"""
EXAMPLES = """
examples:
  python scripts/gpu_day.py pack gpu-kit --prompts train.jsonl --dev-prompts dev.jsonl --data data --held-out held-out
  python scripts/gpu_day.py run --rehearse --results rehearsal --minutes 20       (here, in small, on the CPU)
  python scripts/gpu_day.py run --kit gpu-kit/load-1 --results results --minutes 9 --only 1,3      (on the machine)
  python scripts/gpu_day.py run --kit gpu-kit/load-2 --results results --minutes 9
"""
PROGRAM = "gpu_day.py"
MOST_MINUTES = 24 * 60.0
# How many times the limit of a stage it has in a rehearsal, which is small, and on a slow machine.
SLOWER = 3


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_pack(commands)
    _add_run(commands)
    commands.add_parser("list", help="the parts and stages, with the seconds that they are expected to take")
    return parser


def _add_pack(commands: argparse._SubParsersAction) -> None:
    packed = commands.add_parser("pack", help="write what the machine lacks, in loads that can be carried")
    add = packed.add_argument
    add("out", type=Path, help="folder to write load-1, load-2, ... into; what is in it already is used again")
    add("--load-mib", type=float, default=44.0, help="MiB of a load (default: 44, with the tree under 64)")
    add("--python", default="3.12", metavar="VERSION", help="Python of the machine (default: 3.12)")
    add("--compute-capability", action="append", metavar="X.Y", help="of its GPU; may repeat (default: 9.0)")
    add("--package", action="append", metavar="NAME", help="carry these in place of the usual ones; may repeat")
    add("--no-kernels", action="store_true", help="compile no kernels: the machine's Triton does it")
    add("--prompts", type=Path, metavar="FILE", help="prompts to train on")
    add("--dev-prompts", type=Path, metavar="FILE", help="prompts to measure on")
    add("--data", type=Path, metavar="FOLDER", help="answers that ht-train data has made, to fit to at once")
    add("--held-out", type=Path, metavar="FOLDER", help="others, to measure on")


def _add_run(commands: argparse._SubParsersAction) -> None:
    running = commands.add_parser("run", help="run the parts, and go on where an earlier run stopped")
    add = running.add_argument
    add("--kit", type=Path, metavar="FOLDER", help="what pack has written: all loads, or the one that is here now")
    add("--results", type=Path, default=Path("gpu-results"), metavar="FOLDER", help="(default: gpu-results)")
    add("--work", type=Path, metavar="FOLDER", help="what is made on the way (default: RESULTS.work beside it)")
    add("--minutes", type=float, default=30.0, help="time for all of it (default: 30; 8 are of use)")
    add("--only", metavar="PARTS", help="these parts or stages, by number or name, with commas")
    add("--list", action="store_true", help="show the parts and stages, and do nothing")
    add("--rehearse", action="store_true", help="do the same in small on a CPU; nothing of it is a measurement")
    add("--unpack-only", action="store_true", help="take in the load that is here now, and do nothing more")
    add("--model", default="smollm2-135m", help="model of parts 2, 4 and 5 (default: smollm2-135m)")
    add("--seed", type=int, default=0, help="of all that is random (default: 0)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `gpu_day.py`; return the exit status: 1 where a section failed, else 0."""
    given = sys.argv[1:] if arguments is None else list(arguments)

    def work() -> int:
        options = build_parser().parse_args(given)
        if options.command == "list" or getattr(options, "list", False):
            say("\n".join(listed()))
            return 0
        return _pack(options) if options.command == "pack" else _run(options, given)

    return run_program(PROGRAM, work, interrupted="interrupted; the same command goes on")


def listed() -> list[str]:
    """Return the stages in their order, as lines."""
    lines = ["stage           part            expected   at most  what it does"]
    for stage in STAGES:
        part = f"{stage.part} {PARTS[stage.part]}"
        lines.append(f"{stage.name:<15} {part:<14} {stage.expected:>7} s {stage.limit:>7} s  {stage.title}")
    total = sum(stage.expected for stage in STAGES)
    return [*lines, f"expected in all: {total / 60:.0f} minutes on a large GPU; a guess until it was run there"]


def _pack(options: argparse.Namespace) -> int:
    capabilities = options.compute_capability or ["9.0"]
    for one in capabilities:
        if not re.fullmatch(r"\d{1,2}\.\d", one):
            raise InputError(f"--compute-capability {one!r} is not of the form 9.0")
    if not re.fullmatch(r"3\.\d{1,2}", options.python):
        raise InputError(f"--python {options.python!r} is not of the form 3.12")
    usual = PackSettings(options.out)
    settings = PackSettings(
        options.out,
        python=options.python,
        architectures=tuple(int(one.replace(".", "")) for one in capabilities),
        load_bytes=int(options.load_mib * MEBIBYTE),
        packages=tuple(options.package) if options.package else usual.packages,
        kernels=0 if options.no_kernels else None,
        prompts=options.prompts,
        dev_prompts=options.dev_prompts,
        data=options.data,
        held_out=options.held_out,
    )
    about = pack(settings, _tell)
    for number, names in enumerate(about["loads"], start=1):
        folder = options.out / f"load-{number}"
        size = sum(path.stat().st_size for path in folder.iterdir())
        say(f"{folder}: {size / MEBIBYTE:.1f} MiB: {', '.join(names)}")
    return 0


def _run(options: argparse.Namespace, given: list[str]) -> int:
    begun = time.monotonic()
    if not 0 < options.minutes <= MOST_MINUTES:
        raise InputError(f"--minutes must be above 0 and at most {MOST_MINUTES:g}, not {options.minutes:g}")
    try:
        stages = chosen(options.only)
    except ValueError as error:
        raise InputError(f"--only: {error}") from error
    work = (options.work or Path(f"{options.results}.work")).absolute()
    device = "cpu" if options.rehearse else "cuda"
    settings = DaySettings(work, options.results.absolute(), device, options.model, seed=options.seed)
    results = DayResults(settings.results, device)
    about = None
    if options.kit is not None:
        if not options.kit.is_dir():
            raise InputError(f"--kit: no folder at {options.kit}; write one with: {PROGRAM} pack")
        about = take_in(options.kit, settings, _tell)
    elif settings.kit.is_dir():
        about = take_in(settings.kit, settings, _tell)
    if options.unpack_only:
        return 0
    _use(packing.site(settings))
    results.begin(describe(given, about))
    for name in results.restore(work):
        _tell(f"put back {name}")
    restore(settings)
    if options.rehearse:
        stages = [replace(stage, limit=SLOWER * stage.limit) for stage in stages]
    outcome = run_stages(
        stages,
        settings,
        results,
        60 * options.minutes - (time.monotonic() - begun),
        _tell,
        lambda: results.keep(kept_files(settings)),
    )
    say("\n".join(told(outcome, results, given)))
    return 1 if _failures(results) else 0


def told(outcome: Outcome, results: DayResults, given: Sequence[str]) -> list[str]:
    """Return the last words of a run: what is done, what failed and how, what is left, and how to go on."""
    lines = [f"results: {results.path}" + (" (a rehearsal on a CPU)" if results.content["rehearsal"] else "")]
    lines.append(f"done: {', '.join(outcome.complete) or 'nothing whole'}")
    for stage, why in outcome.left.items():
        lines.append(f"left of {stage}: {why}")
    lines += [f"failed: {stage}, {section}: {words}" for stage, section, words in _failures(results)]
    if outcome.left:
        lines.append(f"to go on: python scripts/{PROGRAM} {shlex.join(given)}")
    return lines


def _failures(results: DayResults) -> list[tuple[str, str, str]]:
    return [
        (stage, section, str(value["error"]))
        for stage, found in results.content["stages"].items()
        for section, value in found["sections"].items()
        if state_of(value) == FAILED
    ]


def _use(folder: Path) -> None:
    """Let carried packages be imported, here where the machine has none of the name."""
    if folder.is_dir():
        sys.path.append(str(folder))
    root = str(Path(__file__).resolve().parents[2])
    if root not in sys.path:
        sys.path.insert(0, root)
    # In the processes of commands, and those that they start.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [root, *filter(None, [os.environ.get("PYTHONPATH")]), *([str(folder)] if folder.is_dir() else [])]
    )


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
