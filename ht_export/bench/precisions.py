"""`ht-bench precisions`: engines of one model in different precisions, their size, speed, perplexity and agreement."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from typing import Any

import numpy as np
from rich.progress import track

from ht_export.bench.conditions import commit, without_folders
from ht_export.prompts import evenly, read_conversations
from ht_export.verify.logits import logits_of
from runtime import Generator
from runtime.bundle.placing import check_apart
from runtime.checks import MOST_REPEATS, whole
from runtime.errors import InputError
from runtime.files import check_writable, write_json
from runtime.program import pathname, say
from runtime.tuning import cpu_name

# Tokens of text that perplexity is measured on at once.
WINDOW = 256
# The first tokens of a window, which only serve as context.
CONTEXT = 32
ROWS = 64


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ht-bench precisions`."""
    parser.description = (
        "Compare engines of one model in different precisions: size, speed, perplexity, agreement with the first. "
        "Perplexity is that of the prompts' own text, which people wrote, under the engine (raw, in passes of many "
        "rows). Agreement is the share of positions in the first engine's greedy answers where an engine would choose "
        "the same token after the same text, and the share of tokens before its own answer parts from it."
    )
    parser.epilog = (
        "example: ht-bench precisions --prompts prompts.jsonl --threads 2 --json out.json fp32.onnx int8.onnx int4.onnx"
    )
    parser.set_defaults(work=compare, interrupted="interrupted; nothing was written")
    parser.add_argument(
        "engines", type=pathname, nargs="+", help="engines of one model; the first is what the others are compared with"
    )
    parser.add_argument("--prompts", type=pathname, required=True, help="JSON lines with 'prompt' or 'turns'")
    parser.add_argument("--count", type=int, default=20, help="prompts to answer (default: 20)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of each answer (default: 128)")
    parser.add_argument("--windows", type=int, default=40, help="windows of text for the perplexity (default: 40)")
    parser.add_argument("--repeats", type=int, default=3, help="timed answers to each prompt (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all physical cores)")
    parser.add_argument("--json", type=pathname, help="write results here")


def compare(options: argparse.Namespace) -> int:
    """Measure, print a table, write JSON; return the exit status. Raises `InputError` for a user's mistake."""
    for name in ("count", "max_new_tokens", "windows"):
        whole(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    whole("--repeats", options.repeats, 1, MOST_REPEATS)
    if options.json:
        check_writable(options.json)
        check_apart(options.json, options.engines, [options.prompts])
    conversations = read_conversations(options.prompts)
    prompts = [one.turns[0] for one in evenly(conversations, options.count)]
    text = "\n\n".join(one.turns[0] for one in conversations)
    rows: list[dict[str, Any]] = []
    expected: list[list[int]] = []
    for path in options.engines:
        generator = Generator(path, threads=options.threads, prefix_cache_bytes=0)
        row, answers = measure(generator, prompts, options)
        expected = expected or answers
        row |= {"perplexity": perplexity(generator, text, options.windows)}
        row |= agreement(generator, prompts, expected, answers)
        about = generator.about
        rounding = about.parity.get("quantisation", {}).get("method")
        rows.append(
            {
                "engine": path.name,
                "precision": about.precision,
                "rounding": rounding,
                "bytes": size(generator),
                "tuned": (path.parent / f"{path.stem}.tuning.json").is_file(),
                **row,
            }
        )
    report = {
        "command": " ".join(["ht-bench", *map(without_folders, options.arguments)]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": cpu_name(options.threads),
        "model": generator.about.base_model["name"],
        "engines": rows,
    }
    if options.json:
        write_json(options.json, report)
    say(table(rows))
    if not options.json:
        say(json.dumps(report, indent=2))
    return 0


def measure(
    generator: Generator, prompts: list[str], options: argparse.Namespace
) -> tuple[dict[str, Any], list[list[int]]]:
    """Answer the prompts plainly and speculatively; return speeds, tokens per step, and the plain answers."""
    answers: list[list[int]] = []
    speeds: dict[bool, list[float]] = {False: [], True: []}
    steps: list[float] = []
    for prompt in track(prompts, f"answering, {generator.about.precision}"):
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(options.repeats):
            for speculate in (False, True):
                start = time.perf_counter()
                found = generator.generate(prompt, max_new_tokens=options.max_new_tokens, speculate=speculate)
                times[speculate].append(len(found.tokens) / (time.perf_counter() - start))
                if speculate:
                    steps.append(found.tokens_per_step)
                else:
                    plain = found.tokens
        answers.append(plain)
        for speculate, values in times.items():
            speeds[speculate].append(statistics.median(values))
    plain_speed, speed = (statistics.mean(speeds[way]) for way in (False, True))
    return {
        "plain_tokens_per_second": plain_speed,
        "tokens_per_second": speed,
        "speedup": speed / plain_speed,
        "tokens_per_step": statistics.mean(steps),
    }, answers


def perplexity(generator: Generator, text: str, windows: int) -> float:
    """Return the perplexity of `text`, in windows evenly from its beginning to its end."""
    ids = generator.encode(text, raw=True)
    if len(ids) <= CONTEXT:
        raise InputError(
            f"the prompts together have {len(ids)} tokens, and perplexity takes more than {CONTEXT}; give more, "
            "or longer ones"
        )
    count = min(windows, max(1, len(ids) // WINDOW))
    losses = []
    for start in track(np.linspace(0, max(0, len(ids) - WINDOW), count).astype(int), "perplexity"):
        part = ids[start : start + WINDOW]
        logits = logits_of(generator, part[:-1], CONTEXT, ROWS).astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        scores = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        losses += (-scores[np.arange(len(scores)), part[CONTEXT:]]).tolist()
    return math.exp(statistics.mean(losses))


def agreement(
    generator: Generator, prompts: list[str], expected: list[list[int]], answers: list[list[int]]
) -> dict[str, float]:
    """Return how often the engine agrees with the expected answers, token by token and until its own answers part."""
    same = parted = total = 0
    for prompt, tokens, own in zip(prompts, expected, answers, strict=True):
        ids = generator.encode(prompt)
        chosen = logits_of(generator, [*ids, *tokens[:-1]], len(ids), 1).argmax(-1)
        same += int((chosen == np.array(tokens)).sum())
        pairs = zip(tokens, own, strict=False)
        parted += next((index for index, (one, two) in enumerate(pairs) if one != two), min(len(tokens), len(own)))
        total += len(tokens)
    return {"same_choice": same / total, "before_parting": parted / total}


def size(generator: Generator) -> int:
    """Return the bytes of the engine's graph and weights."""
    about = generator.about
    return sum(record.bytes for record in (about.cpu_graph or about.graph, about.weights) if record)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    head = ("precision", "MB", "plain tokens/s", "tokens/s", "speed-up", "tokens per step", "perplexity",
            "same choice", "before parting")  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for row in rows:
        lines.append(
            (
                row["precision"] + (f", {row['rounding']}" if row["rounding"] else ""),
                f"{row['bytes'] / 1e6:,.0f}",
                f"{row['plain_tokens_per_second']:.1f}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['speedup']:.2f}",
                f"{row['tokens_per_step']:.2f}",
                f"{row['perplexity']:.3f}",
                f"{row['same_choice']:.1%}",
                f"{row['before_parting']:.1%}",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
