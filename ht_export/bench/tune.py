"""`ht-bench tune`: how long an engine's steps take on this device, and which sizes bring the most tokens a second."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ht_export.bench.bar import bar
from runtime.checks import MOST_REPEATS, whole
from runtime.errors import InputError
from runtime.files import check_writable
from runtime.program import integers, pathname, say

if TYPE_CHECKING:
    from ht_export.prompts import Conversation
    from runtime.bundle.tuning_file import Tuning
    from runtime.drafting.sizing import BatchMenu, Sizing
    from runtime.generator import Generator
    from runtime.tree import Tree, TreeSizes

CONTEXTS = (64, 512, 2048)
COUNT = 16
MAX_NEW_TOKENS = 128
# Sizes that so small a share of steps chose are left out of the menu.
RARE = 0.01


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ht-bench tune`."""
    parser.description = (
        "Time the engine's steps over tree sizes and context lengths, decode prompts with the sizes that "
        "pay best step by step, and keep the result beside the engine (ENGINE.tuning.json), where every load on this "
        "device finds it. Run it on a quiet machine, with the number of threads that you will use."
    )
    parser.epilog = "example: ht-bench tune engine.onnx --prompts prompts.jsonl --count 16 --threads 4"
    parser.set_defaults(work=tune, interrupted="interrupted; nothing was written")
    parser.add_argument("engine", type=pathname, help="engine file made by ht-export (.onnx or .plan)")
    parser.add_argument(
        "--prompts", type=pathname, metavar="FILE", help="JSON lines with 'prompt' or 'turns' to decode"
    )
    parser.add_argument("--count", type=int, metavar="N", help=f"prompts to use (default: {COUNT})")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=f"of each answer (default: {MAX_NEW_TOKENS})")
    parser.add_argument(
        "--contexts",
        type=integers,
        metavar="N,N,...",
        help="tokens in the cache to time steps at (default: "
        f"{','.join(map(str, CONTEXTS))}, or what the engine has room for)",
    )
    parser.add_argument("--repeats", type=int, default=12, metavar="N", help="of each step (default: 12)")
    parser.add_argument("--device", help="where an .onnx engine runs: cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all physical cores)")
    parser.add_argument("--json", action="store_true", help="print ENGINE.tuning.json in place of a table")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def tune(options: argparse.Namespace) -> int:
    """Measure, print a table, keep the result; return the exit status. Raises `InputError` for a user's mistake."""
    from ht_export.prompts import evenly, read_conversations
    from runtime.bundle.tuning_file import check_place_of_tunings, tuning_path, write_tuning
    from runtime.generator import Generator

    for name, number in (
        ("--count", options.count),
        ("--max-new-tokens", options.max_new_tokens),
        ("--repeats", options.repeats),
    ):
        if number is not None:
            whole(name, number, 1, MOST_REPEATS)
        if number is not None and name != "--repeats" and not options.prompts:
            raise InputError(f"{name} is for --prompts; add it, or leave {name} out")
    prompts = evenly(read_conversations(options.prompts), options.count or COUNT) if options.prompts else []
    generator = Generator(
        options.engine, device=options.device, threads=options.threads, adapt=False, prefix_cache_bytes=0
    )
    check_writable(tuning_path(options.engine))
    check_place_of_tunings(options.engine)
    texts = [_encoded(generator, prompt) for prompt in prompts]
    tuning = measure_menu(generator, options.contexts, options.repeats, options.threads, options.quiet)
    if texts:
        tuning = decode(generator, tuning, texts, options.max_new_tokens or MAX_NEW_TOKENS, options.quiet)
    write_tuning(options.engine, tuning)
    say(tuning_path(options.engine).read_text(encoding="utf-8").rstrip() if options.json else to_markdown(tuning))
    return 0


def measure_menu(
    generator: Generator, contexts: Sequence[int] | None, repeats: int, threads: int | None, quiet: bool
) -> Tuning:
    """Time passes of all sizes worth it, at the contexts asked for. Raises `InputError` for one too long."""
    from runtime.bundle.tuning_file import Tuning
    from runtime.tuning import BATCHES, batch_sizes, device_name, measure, measure_batches, menu_sizes

    about = generator.about
    sizes = menu_sizes(about.tree)
    if about.plan:
        most = about.plan.limits.max_rows
        sizes = tuple(one for one in sizes if max(one.tree_rows, *one.pseudo_rows) <= most)
    room = about.max_context - max(one.tree_rows for one in sizes) - 1
    for context in contexts or ():
        if not 0 <= context <= room:
            raise InputError(f"--contexts {context}: this engine has room for 0 to {room} tokens beside a step's rows")
    chosen = sorted(set(contexts or (min(context, room) for context in CONTEXTS)))
    start = time.perf_counter()
    with bar("timing steps", quiet) as tell:
        menu = measure(generator.engine, sizes, chosen, repeats, progress=tell, new_drafter=generator.new_drafter)
    batches = []
    if generator.engine.max_slots > 1:
        fitting = [one for one in batch_sizes(about.tree) if one.tree_rows <= max(size.tree_rows for size in sizes)]
        with bar("timing steps of several requests", quiet) as tell:
            batches = measure_batches(
                generator.engine,
                fitting,
                chosen[:2],
                BATCHES,
                max(1, repeats // 2),
                progress=tell,
                new_drafter=generator.new_drafter,
            )
    device = device_name(generator.engine, threads)
    measured = {"seconds": round(time.perf_counter() - start, 1), "repeats": repeats}
    return Tuning(device, about.identity, menu, kind="full", about=measured, batches=tuple(batches))


def decode(
    generator: Generator, tuning: Tuning, texts: Sequence[Sequence[int]], max_new_tokens: int, quiet: bool
) -> Tuning:
    """Answer `texts` with adaptive sizes; return `tuning` with what they came to, and without sizes hardly used."""
    from runtime.decode import DecodingState
    from runtime.drafting.sizing import AdaptiveSizes, Menu
    from runtime.scheduling.job import Job
    from runtime.scheduling.scheduler import Limits, run
    from runtime.scheduling.slots import MANY

    chosen: Counter[TreeSizes] = Counter()
    rates, values = [], []
    tokens = steps = 0
    with bar("decoding prompts", quiet) as tell:
        for number, ids in enumerate(texts):
            sizing = AdaptiveSizes(tuning.menu, tuning.rate, tuning.draft_value)
            drafter = generator.new_drafter(_Counted(sizing, chosen))
            engine = generator.about
            request = DecodingState(
                ids,
                drafter,
                engine.prompt_chunk,
                engine.dims.join_order,
                max_new_tokens=min(max_new_tokens, engine.max_context - len(ids)),
                ends=engine.stop_tokens.__contains__,
            )
            for _ in run(generator.engine, [Job(request, MANY)], Limits(prompt_chunk=engine.prompt_chunk)):
                # Chunks of the prompt before its last make no token certain.
                steps += bool(request.tokens)
            tokens += len(request.tokens)
            rates.append(sizing.rate)
            values.append(sizing.draft_value)
            tell(number + 1, len(texts))
    # The first are those of plain decoding.
    least = RARE * sum(chosen.values())
    kept = [n for n, sizes in enumerate(tuning.menu.sizes) if not n or chosen[sizes] >= least]
    menu = Menu(tuple(tuning.menu.sizes[n] for n in kept), tuning.menu.contexts, tuning.menu.seconds[:, kept])
    about = {
        **tuning.about,
        "prompts": len(texts),
        "tokens_per_step": round(tokens / steps, 3),
        "steps": {_name(sizes): count for sizes, count in chosen.most_common()},
    }
    rate, value = sum(rates) / len(rates), sum(values) / len(values)
    return replace(tuning, menu=menu, rate=round(rate, 4), draft_value=round(value, 4), about=about)


def _encoded(generator: Generator, prompt: Conversation) -> list[int]:
    ids = generator.encode(prompt.turns[0])
    if len(ids) >= generator.about.max_context:
        raise InputError(
            f"prompt {prompt.id} has {len(ids)} tokens, and the engine's context limit is "
            f"{generator.about.max_context}; leave it out"
        )
    return ids


class _Counted:
    """Sizes as another chooses them, counted."""

    def __init__(self, sizing: Sizing, chosen: Counter[TreeSizes]) -> None:
        self.sizing = sizing
        self.chosen = chosen
        self.most_rows = sizing.most_rows
        self.least = sizing.least
        self.draft_steps = sizing.draft_steps

    def choose(self, tree: Tree, context: int, drafted: bool) -> TreeSizes:
        sizes = self.sizing.choose(tree, context, drafted)
        self.chosen[sizes] += 1
        return sizes

    def learn(self, accepted: int) -> None:
        self.sizing.learn(accepted)


def to_markdown(tuning: Tuning) -> str:
    """Return the menu as a table, and a line on what was decoded."""
    menu = tuning.menu
    heads = [f"ms at {context}" for context in menu.contexts]
    lines = ["| sizes | " + " | ".join([*heads, "of a plain step", "times chosen"]) + " |"]
    lines.append("| --- |" + " ---: |" * (len(heads) + 2))
    for number, sizes in enumerate(menu.sizes):
        times = [f"{1e3 * seconds:.2f}" for seconds in menu.seconds[:, number]]
        share = f"{menu.seconds[0, number] / menu.seconds[0, 0]:.2f}"
        steps = str(tuning.about.get("steps", {}).get(_name(sizes), ""))
        lines.append(f"| {_name(sizes)} | " + " | ".join([*times, share, steps]) + " |")
    if tuning.batches:
        lines += ["", *_batch_table(tuning.batches)]
    lines.append(f"\n{tuning.device}; a step of 4(4,2,2) has 4 candidates, and pseudo rows for 4, 2 and 2 of them.")
    if "tokens_per_step" in tuning.about:
        lines.append(
            f"{tuning.about['prompts']} prompts: {tuning.about['tokens_per_step']:.2f} tokens per step, expected to be "
            f"{tuning.rate:.2f} times as fast as plain decoding."
        )
    return "\n".join(lines)


def _batch_table(batches: Sequence[BatchMenu]) -> list[str]:
    """Return how long passes of several requests take, at the shortest context, as a table."""
    heads = [f"ms of {one.requests} requests" for one in batches]
    lines = ["| sizes | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for number, sizes in enumerate(batches[0].menu.sizes):
        times = [f"{1e3 * one.menu.seconds[0, number]:.2f}" for one in batches]
        lines.append(f"| {_name(sizes)} | " + " | ".join(times) + " |")
    return lines


def _name(sizes: TreeSizes) -> str:
    return f"{sizes.tree_rows}({','.join(map(str, sizes.pseudo_rows))})"
