"""Measure an engine: is its text that of `transformers`, how many tokens a step, how fast against plain decoding.

    python scripts/benchmark.py ENGINE --model smollm2-135m --prompts dev_prompts.jsonl --count 40

For each prompt, in one process and with the same threads: speculative decoding, plain decoding in the same engine, and
`transformers.generate`. Speed-up is the mean over prompts of tokens/s, prompt processing included, divided by the same
for plain decoding. Prompts are JSON lines with 'prompt' or 'turns' (the first turn is used); they are taken evenly from
the whole file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ht_export.checkpoint import BaseModel, load_base_model
from ht_export.progress import progress_bar
from ht_export.training.prompts import Conversation, read_conversations
from runtime import GenerationResult, Generator, InputError, TreeSizes
from runtime.command_line import integers

TIE = 1e-4


def main() -> int:
    """Run the benchmark; exit with 1 when a text differs from that of `transformers` other than at a tie."""
    options = parse_arguments()
    try:
        prompts = read_conversations(options.prompts)
        generator = Generator(options.engine, threads=options.threads)
        base = None if options.no_transformers else load_base_model(options.model)
    except InputError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads)
    spread = max(1, len(prompts) // options.count)
    chosen = prompts[::spread][: options.count]
    tree = TreeSizes(options.tree_rows, options.pseudo_rows) if options.tree_rows else None
    generator.generate(chosen[0].turns[0], max_new_tokens=8)
    rows = []
    with progress_bar() as progress:
        for prompt in progress.track(chosen, description="measuring"):
            rows.append(measure(generator, base, prompt, options.max_new_tokens, tree))
    report = summarise(rows, options, generator)
    print_table(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["identical_to_plain"] and not report["differences_that_are_no_ties"] else 1


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--model", default="smollm2-135m", help="the engine's base model (default: smollm2-135m)")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40, help="prompts to use (default: 40)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tree-rows", type=int, help="instead of the engine's own")
    parser.add_argument("--pseudo-rows", type=integers, help="R1,R2,...")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers.generate out")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    return parser.parse_args()


def measure(
    generator: Generator, base: BaseModel | None, prompt: Conversation, max_new_tokens: int, tree: TreeSizes | None
) -> dict[str, Any]:
    """Return what one prompt gave in each way of decoding."""
    row: dict[str, Any] = {"id": prompt.id, "task": prompt.task}
    text = prompt.turns[0]
    plain, plain_seconds = timed(lambda: generator.generate(text, max_new_tokens=max_new_tokens, speculate=False))
    fast, fast_seconds = timed(lambda: generator.generate(text, max_new_tokens=max_new_tokens, tree=tree))
    row["identical_to_plain"] = fast.tokens == plain.tokens
    row["prompt_tokens"], row["new_tokens"], row["steps"] = fast.prompt_tokens, len(fast.tokens), fast.steps
    row["plain"] = speeds(plain, plain_seconds)
    row["speculative"] = speeds(fast, fast_seconds)
    if base is not None:
        ids = generator.encode(text)
        expected, seconds = timed(lambda: reference_tokens(base, ids, max_new_tokens))
        row["transformers_tokens_per_second"] = len(expected) / seconds
        row["difference"] = first_difference(base, ids, fast.tokens, expected)
    return row


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of `work` and its seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def speeds(result: GenerationResult, seconds: float) -> dict[str, float]:
    """Return tokens per second with and without the prompt, and the time to the first token."""
    return {
        "tokens_per_second": len(result.tokens) / seconds,
        "decode_tokens_per_second": result.decode_tokens_per_second,
        "time_to_first_token_s": result.time_to_first_token_s,
    }


@torch.inference_mode()
def reference_tokens(base: BaseModel, ids: list[int], max_new_tokens: int) -> list[int]:
    """Return the new tokens of `transformers.generate`, greedy."""
    input_ids = torch.tensor([ids])
    output = base.model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=max_new_tokens
    )
    return output[0, len(ids) :].tolist()


@torch.inference_mode()
def first_difference(base: BaseModel, ids: list[int], found: list[int], expected: list[int]) -> dict[str, Any] | None:
    """Return where two answers part, with the gap between the base model's two best logits there; None if nowhere."""
    if found == expected:
        return None
    pairs = list(zip(found, expected, strict=False))
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    logits = base.model(torch.tensor([ids + expected[:position]])).logits[0, -1]
    best = logits.topk(2).values
    return {"position": position, "top_two_logit_gap": float(best[0] - best[1])}


def summarise(rows: list[dict[str, Any]], options: argparse.Namespace, generator: Generator) -> dict[str, Any]:
    """Return the conditions, the numbers overall and per task, and every prompt's row."""
    groups = {"overall": rows} | {
        task: [r for r in rows if r["task"] == task] for task in sorted({r["task"] for r in rows})
    }
    differences = [row for row in rows if row.get("difference")]
    about = generator.about
    return {
        "conditions": {
            "command": " ".join(sys.argv),
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "model": about.base_model["name"],
            "precision": about.precision,
            "device": f"CPU, {options.threads} threads",
            "prompts": len(rows),
            "max_new_tokens": options.max_new_tokens,
            "tree_rows": options.tree_rows or about.tree.tree_rows,
            "pseudo_rows": options.pseudo_rows if options.tree_rows else about.tree.pseudo_rows,
            "versions": about.versions,
        },
        "identical_to_plain": all(row["identical_to_plain"] for row in rows),
        "identical_to_transformers": f"{len(rows) - len(differences)} of {len(rows)}",
        "ties": [row["difference"] for row in differences if row["difference"]["top_two_logit_gap"] < TIE],
        "differences_that_are_no_ties": [
            {"id": row["id"], **row["difference"]}
            for row in differences
            if row["difference"]["top_two_logit_gap"] >= TIE
        ],
        "results": {name: group_summary(group) for name, group in groups.items()},
        "prompts": rows,
    }


def commit() -> str:
    """Return the commit that is checked out, or nothing outside a clone."""
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def group_summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the means over prompts, and their ratios."""

    def mean(kind: str, key: str) -> float:
        return statistics.fmean(row[kind][key] for row in rows)

    plain, fast = mean("plain", "tokens_per_second"), mean("speculative", "tokens_per_second")
    summary = {
        "prompts": len(rows),
        "speedup": fast / plain,
        "decode_speedup": mean("speculative", "decode_tokens_per_second") / mean("plain", "decode_tokens_per_second"),
        "tokens_per_step": sum(row["new_tokens"] for row in rows) / sum(row["steps"] for row in rows),
        "plain_tokens_per_second": plain,
        "tokens_per_second": fast,
        "time_to_first_token_s": mean("speculative", "time_to_first_token_s"),
    }
    if "transformers_tokens_per_second" in rows[0]:
        reference = statistics.fmean(row["transformers_tokens_per_second"] for row in rows)
        summary["transformers_tokens_per_second"] = reference
        summary["plain_over_transformers"] = plain / reference
    return summary


def print_table(report: dict[str, Any]) -> None:
    """Print the results as a Markdown table."""
    names = list(report["results"]["overall"])
    print("| task | " + " | ".join(name.replace("_", " ") for name in names) + " |")
    print("| --- |" + " ---: |" * len(names))
    for task, summary in report["results"].items():
        cells = [f"{summary[name]:.0f}" if name == "prompts" else f"{summary[name]:.2f}" for name in names]
        print(f"| {task} | " + " | ".join(cells) + " |")
    print(f"\nidentical to plain decoding: {report['identical_to_plain']}; to transformers: ", end="")
    print(f"{report['identical_to_transformers']}; ties: {report['ties']}; ", end="")
    print(f"other differences: {report['differences_that_are_no_ties']}")


if __name__ == "__main__":
    sys.exit(main())
