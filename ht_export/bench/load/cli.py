"""`ht-bench load`: an engine under load, speculative against plain, and whether every text is the text alone."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ht_export.bench.bar import bar
from ht_export.bench.load import url
from runtime.checks import LARGEST, MOST_REPEATS, number, whole
from runtime.errors import InputError
from runtime.files import check_writable, sha256_file, write_json
from runtime.program import integers, pathname, say

if TYPE_CHECKING:
    from ht_export.bench.load.arrivals import Arrivals
    from ht_export.bench.load.measure import Run
    from ht_export.bench.settings import Job
    from runtime.generator import Generator

FORMAT, FORMAT_VERSION = "ht-bench-load", 1
CLIENTS = (1, 2, 4, 8)
WAYS: dict[str, dict[str, Any]] = {"plain": {"speculate": False}, "speculative": {}}
MOST_CLIENTS = 1024
MOST_REQUESTS = 1 << 20


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ht-bench load`."""
    parser.description = (
        "Answer many prompts at once, by plain and by speculative decoding in turn, for each pattern of arrivals: "
        "tokens/s in all, time to the first token and between tokens, how many requests ran and waited, acceptance. "
        "Prefix reuse is off. Exits with 1 when a text is not that of its request alone: in float32, other than at a "
        "tie."
    )
    parser.epilog = (
        "examples: ht-bench load engine.onnx --prompts prompts.jsonl --clients 1,4,16 --json load.json; "
        "ht-bench load --url http://127.0.0.1:8000/v1 --prompts prompts.jsonl --clients 16 --seconds 60 --leave 0.5"
    )
    parser.set_defaults(work=load, interrupted="interrupted; nothing was written")
    parser.add_argument("engine", type=pathname, nargs="?", help="engine file made by ht-export (.onnx or .plan)")
    parser.add_argument(
        "--prompts", type=pathname, required=True, metavar="FILE", help="JSON lines with 'prompt' or 'turns'"
    )
    when = parser.add_mutually_exclusive_group()
    when.add_argument(
        "--clients",
        type=integers,
        metavar="N,N,...",
        help="so many clients, each of which asks again when it has its answer (default: "
        f"{','.join(map(str, CLIENTS))})",
    )
    when.add_argument("--rate", type=float, metavar="R", help="requests at random, R a second (Poisson)")
    when.add_argument("--trace", type=pathname, metavar="FILE", help="JSON lines with a 'time' in seconds each")
    parser.add_argument("--requests", type=int, default=32, metavar="N", help="of each run, at least (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--max-batch", type=int, metavar="N", help="requests that run at once (default: 16, or the most clients)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each way (default: 3)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of arrivals, and of sampling (default: 0)")
    parser.add_argument("--device", help="where an .onnx engine runs: cpu, cuda (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all physical cores)")
    parser.add_argument("--json", type=pathname, metavar="FILE", help="write results here")
    parser.add_argument("--plot", type=pathname, metavar="FILE", help="draw them here, as a PNG file")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    url.add_options(parser)


def load(options: argparse.Namespace) -> int:
    """Measure, print a table, write files; return the exit status. Raises `InputError` for a user's mistake."""
    _check(options)
    if (options.engine is None) == (options.url is None):
        raise InputError("give an engine, or --url with the address of a server: one of them")
    if options.url is not None:
        return url.load(options, _patterns(options))
    for name in ("model", "seconds"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name} is for a server; give --url, or leave it out")
    from ht_export.bench.load.summary import to_markdown
    from ht_export.bench.settings import Job
    from ht_export.prompts import read_conversations
    from runtime.generator import MAX_BATCH, Generator
    from runtime.sampling import Sampling

    patterns = _patterns(options)
    prompts = read_conversations(options.prompts)
    sampling = Sampling(temperature=options.temperature)
    largest = max((pattern.clients for pattern in patterns), default=0)
    max_batch = options.max_batch or max(MAX_BATCH, largest)
    generator = Generator(
        options.engine,
        device=options.device,
        threads=options.threads,
        max_batch=max_batch,
        max_queue=MOST_REQUESTS,
        prefix_cache_bytes=0,
    )
    count = max(options.requests, 2 * largest)
    jobs = []
    for index in range(count):
        prompt = prompts[index * len(prompts) // count if count < len(prompts) else index % len(prompts)]
        seed = options.seed + index if options.temperature else None
        jobs.append(Job(prompt.id, prompt.task, prompt.turns[0], replace(sampling, seed=seed)))
    for job in jobs:
        try:
            generator.check(job.text, max_new_tokens=options.max_new_tokens, sampling=job.sampling)
        except InputError as error:
            raise InputError(f"prompt {job.id}: {error}") from error
    results = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "conditions": _conditions(options, generator, len(prompts), count, max_batch),
        **_measured(generator, patterns, jobs, options),
    }
    if options.json:
        write_json(options.json, results)
    say(to_markdown(results))
    if options.plot:
        from ht_export.bench.load.plot import plot

        plot(results, options.plot)
    wrong = len(results["check"]["wrong"])
    if wrong:
        print(f"ht-bench: {wrong} texts are wrong: see above", file=sys.stderr)
    return 1 if wrong else 0


def _measured(
    generator: Generator, patterns: Sequence[Arrivals], jobs: Sequence[Job], options: argparse.Namespace
) -> dict[str, Any]:
    from ht_export.bench.load.check import check_texts
    from ht_export.bench.load.measure import run
    from ht_export.bench.load.summary import summarise

    total = len(jobs) * (len(patterns) * len(WAYS) * options.repeats + 1)
    done = 0
    most = {"max_new_tokens": options.max_new_tokens}
    levels: list[dict[str, Any]] = []
    measured: list[tuple[str, str, Run]] = []
    with bar("answering under load", options.quiet) as tell:

        def tick() -> None:
            nonlocal done
            done += 1
            tell(done, total)

        # Alone, one after the other, which also warms up.
        alone = []
        for job in jobs:
            alone.append(generator.generate(job.text, sampling=job.sampling, speculate=False, **most).tokens)
            tick()
        generator.warm_up()
        for pattern in patterns:
            runs: dict[str, list[Run]] = {way: [] for way in WAYS}
            for turn in range(options.repeats):
                # In turns, and the first of them another each time.
                for way in sorted(WAYS, reverse=bool(turn % 2)):
                    found = run(generator, pattern, jobs, {**most, **WAYS[way]}, tick)
                    runs[way].append(found)
                    measured.append((pattern.name, way, found))
            levels.append(
                {
                    "arrivals": pattern.name,
                    "clients": pattern.clients or None,
                    "ways": {way: summarise(runs[way]) for way in WAYS},
                    "looks": {way: runs[way][-1].looks for way in WAYS},
                }
            )
    return {"levels": levels, "check": check_texts(generator, jobs, alone, measured)}


def _patterns(options: argparse.Namespace) -> list[Arrivals]:
    from ht_export.bench.load.arrivals import clients, poisson, trace

    if options.trace is not None:
        return [trace(options.trace, options.requests)]
    if options.rate is not None:
        return [poisson(number("--rate", options.rate, 1e-3, 1e6), options.requests, options.seed)]
    return [clients(whole("--clients", count, 1, MOST_CLIENTS)) for count in options.clients or CLIENTS]


def _check(options: argparse.Namespace) -> None:
    """Raise `InputError` for what would be missed only after a long time."""
    for name, given, least, most in (
        ("--requests", options.requests, 1, MOST_REQUESTS),
        ("--max-new-tokens", options.max_new_tokens, 1, LARGEST),
        ("--max-batch", options.max_batch, 1, MOST_CLIENTS),
        ("--repeats", options.repeats, 1, MOST_REPEATS),
        ("--seed", options.seed, 0, LARGEST - MOST_REQUESTS),
    ):
        if given is not None:
            whole(name, given, least, most)
    for path in (options.json, options.plot):
        if path is not None:
            check_writable(path)
    if options.plot is not None and not importlib.util.find_spec("matplotlib"):
        raise InputError("--plot needs matplotlib; install hidden-transfer[bench], or leave it out")


def _conditions(
    options: argparse.Namespace, generator: Generator, prompts: int, requests: int, max_batch: int
) -> dict[str, Any]:
    from ht_export.bench.conditions import commit, gpu_name, without_folders
    from runtime.engines.opening import runs_on_cpu
    from runtime.tuning import cpu_name

    about = generator.about
    return {
        "command": " ".join(["ht-bench", *(shlex.quote(without_folders(one)) for one in options.arguments)]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "model": about.base_model["name"],
        "precision": about.precision,
        "device": cpu_name(options.threads) if runs_on_cpu(about, options.device) else gpu_name(),
        "engine": {"file": Path(options.engine).name, "sha256": about.graph.sha256},
        "prompts": {"file": options.prompts.name, "sha256": sha256_file(options.prompts), "count": prompts},
        "requests": requests,
        "max_new_tokens": options.max_new_tokens,
        "max_batch": max_batch,
        "temperature": options.temperature,
        "seed": options.seed,
        "repeats": options.repeats,
    }
