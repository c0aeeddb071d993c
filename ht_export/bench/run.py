"""`ht-bench run`: an engine's speed and text against plain decoding, `transformers` and other engines."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ht_export.bench.bar import bar
from runtime.errors import InputError
from runtime.files import check_writable
from runtime.program import add_adapter, integers, pathname, say

if TYPE_CHECKING:
    from ht_export.bench.results import Results
    from ht_export.bench.settings import BenchSettings
    from runtime.generator import Generator

DEFAULT_MODEL = "smollm2-135m"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ht-bench run`."""
    parser.description = (
        "Answer prompts by speculative and by plain decoding in an engine, by transformers.generate, and "
        "in other ways that are asked for: all in one process, one after another, several times. Prints tables; writes "
        "JSON and plots. Killed at any point, the same command with --json continues. Exits with 1 when a text differs "
        "from that of plain decoding or of transformers where it must not: in float32, other than at a tie."
    )
    parser.epilog = (
        "example: ht-bench run engine.onnx --prompts prompts.jsonl --count 40 --json results.json "
        "--plots plots/ --prompt-lookup --compare medusa=medusa.onnx"
    )
    parser.set_defaults(work=run, interrupted="interrupted; with --json, run the same command again to continue")
    parser.add_argument("engine", type=pathname, help="engine file made by ht-export (.onnx or .plan)")
    parser.add_argument("--json", type=pathname, metavar="FILE", help="write results here, after each prompt")
    parser.add_argument("--table", type=pathname, metavar="FILE", help="write here, as Markdown, how many times as "
                        "fast as each other way ours is, by task")  # fmt: skip
    parser.add_argument("--plots", type=pathname, metavar="DIR", help="folder for plots as PNG files (default: none)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    _add_prompts(parser.add_argument_group("prompts"))
    _add_ways(parser.add_argument_group("what is compared"))
    _add_sampling(
        parser.add_argument_group(
            "sampling", "Greedy unless --temperature is given; options as in ht-generate. The same for transformers."
        )
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print tables, write files; return the exit status. Raises `InputError` for a user's mistake."""
    from ht_export.bench.conditions import conditions_of
    from ht_export.bench.results import Results
    from ht_export.bench.settings import choose_prompts, jobs_of
    from ht_export.bench.table import to_markdown
    from ht_export.bench.ways import load_engines

    settings = _settings(options)
    _check_outputs(settings.model is not None, options.json, options.table, options.plots)
    prompts = choose_prompts(settings)
    generator, others = load_engines(settings)
    conditions = conditions_of(settings, generator, others, len(prompts), options.arguments)
    results = Results(options.json, conditions, jobs_of(prompts, settings))
    if results.left:
        _measure(results, generator, others, settings, options.quiet)
    found = results.to_dict()
    say(to_markdown(found))
    if options.table:
        from ht_export.bench.yardsticks import write_yardsticks

        write_yardsticks(found, options.table)
    if options.plots:
        from ht_export.bench.plots import plot_results

        plot_results(found, options.plots)
    wrong = sum(check["wrong"] for check in found["checks"].values())
    if wrong:
        print(f"ht-bench: {wrong} texts are wrong: see above", file=sys.stderr)
    return 1 if wrong else 0


def _measure(
    results: Results, generator: Generator, others: dict[str, Generator], settings: BenchSettings, quiet: bool
) -> None:
    from ht_export.bench.measure import measure
    from ht_export.bench.ways import check_jobs, engine_ways
    from runtime.engines.opening import runs_on_cpu

    jobs = results.left
    check_jobs(jobs, generator, others, settings)
    ways = engine_ways(generator, others, settings)
    if settings.self_speculative is not None:
        from ht_export.bench.self_speculative.way import self_speculative_way

        ways.append(self_speculative_way(settings, generator))
    if settings.model is not None:
        from ht_export.bench.reference import reference_ways

        ways += reference_ways(generator, settings, not runs_on_cpu(generator.about, settings.device))
    for _ in range(settings.warm_up):
        for way in ways:
            way.answer(jobs[0])
    done, each = len(results.rows), len(ways) * settings.repeats
    answers = itertools.count(each * done + 1)
    total = each * (done + len(jobs))
    with bar("measuring answers", quiet) as tell:
        for turn, job in enumerate(jobs, start=done):
            prompt_tokens = len(generator.encode(job.text))
            counted = measure(ways, job, prompt_tokens, settings.repeats, turn, tick=lambda: tell(next(answers), total))
            results.add(counted)


def _check_outputs(with_transformers: bool, json: Path | None, table: Path | None, plots: Path | None) -> None:
    """Raise `InputError` for what would be missed only after a long time: libraries, and places for files."""
    missing = [name for name in ("torch", "transformers") if with_transformers and not importlib.util.find_spec(name)]
    if missing:
        raise InputError(
            f"comparing with transformers needs {' and '.join(missing)}; install hidden-transfer[bench], or use "
            "--no-transformers"
        )
    for path in filter(None, (json, table)):
        check_writable(path)
    if json is not None and table is not None and json.resolve() == table.resolve():
        raise InputError(f"--table {table} is --json too; choose another name for one of them")
    if plots is not None:
        if not importlib.util.find_spec("matplotlib"):
            raise InputError("--plots needs matplotlib; install hidden-transfer[bench], or leave it out")
        from ht_export.bench.plots import FILES

        for name in FILES:
            check_writable(plots / name)


def _settings(options: argparse.Namespace) -> BenchSettings:
    from ht_export.bench.settings import BenchSettings, seeds_of
    from runtime.sampling import Sampling
    from runtime.tree import TreeSizes

    if (options.tree_rows is None) != (options.pseudo_rows is None):
        raise InputError("--tree-rows and --pseudo-rows go together; give both, or neither")
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )
    return BenchSettings(
        engine=options.engine,
        prompts=options.prompts,
        model=None if options.no_transformers else options.model,
        compare=tuple(options.compare),
        count=options.count,
        tasks=options.tasks,
        max_new_tokens=options.max_new_tokens,
        repeats=options.repeats,
        warm_up=options.warm_up,
        threads=options.threads,
        device=options.device,
        sampling=sampling,
        seeds=seeds_of(sampling, options.seed, options.seeds),
        tree=None if options.tree_rows is None else TreeSizes(options.tree_rows, options.pseudo_rows),
        prompt_lookup=options.prompt_lookup,
        without_ngrams=options.without_ngrams,
        text_drafts=options.text_drafts,
        self_speculative=options.self_speculative,
        early_exit=options.early_exit,
        adapters=tuple(options.adapters),
    )


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompts",
        type=pathname,
        required=True,
        metavar="FILE",
        help="JSON lines with 'prompt' (a string) or 'turns' (a list of strings, of which the first is used)",
    )
    group.add_argument("--count", type=int, metavar="N", help="use at most N, evenly from the file (default: all)")
    group.add_argument(
        "--tasks", type=_names, default=(), metavar="A,B", help="use those with 'task' A or B only (default: all)"
    )
    group.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="times to answer a prompt (default: 3)")
    group.add_argument("--warm-up", type=int, default=1, metavar="N", help="times before, not counted (default: 1)")


def _add_ways(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", help="where an .onnx engine runs: cpu, cuda, cuda:1 (default: cpu)")
    group.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of everything (default: all physical cores)"
    )
    group.add_argument("--tree-rows", type=int, metavar="T", help="candidates of every pass, instead of adapting")
    group.add_argument(
        "--pseudo-rows", type=integers, metavar="R1,R2,...", help="with it: pseudo rows of each draft step"
    )
    group.add_argument("--without-ngrams", action="store_true", help="also measure trees without n-gram branches")
    group.add_argument(
        "--text-drafts", action="store_true", help="also measure drafts from the text alone, as prompt lookup has them"
    )
    group.add_argument(
        "--self-speculative",
        type=pathname,
        metavar="FILE",
        help="also measure drafts of the model without the blocks that FILE names; made by ht-train skip-blocks",
    )
    group.add_argument(
        "--compare",
        type=_name_and_path,
        action="append",
        default=[],
        metavar="NAME=ENGINE",
        help="also measure another engine of the same base model, with a tree of its own, against plain decoding in "
        "ENGINE; may repeat",
    )
    model = group.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"the engine's base model, for transformers, which runs it in float32 (default: {DEFAULT_MODEL})",
    )
    model.add_argument("--no-transformers", action="store_true", help="leave transformers out; needs the runtime only")
    add_adapter(group)
    group.add_argument("--prompt-lookup", action="store_true", help="also measure transformers with prompt lookup")
    group.add_argument(
        "--early-exit",
        type=int,
        metavar="LAYERS",
        help="also measure transformers with drafts of the model's first layers, so many (assistant_early_exit)",
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="default: all tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="default: 1")
    group.add_argument("--min-p", type=float, metavar="P", help="default: 0")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="default: 1")
    group.add_argument("--seed", type=int, metavar="N", help="the first seed (default: 0)")
    group.add_argument("--seeds", type=int, metavar="N", help="seeds that each prompt is run with (default: 3)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _name_and_path(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name and an engine such as medusa=medusa.onnx")
    return name, Path(path)
