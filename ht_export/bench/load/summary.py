"""What runs under load come to: one summary of each way and pattern, as plain data, as a table and as a plot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from ht_export.bench.load.measure import Run

QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99}


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the medians over runs of tokens/s, of the quantiles of times, and of what the engine did."""
    each = [_of_one(run) for run in runs]
    accepted: Counter[int] = Counter()
    for run in runs:
        for answer in run.answers:
            accepted.update(dict(enumerate(answer.accepted)))
    steps = sum(accepted.values())
    return {
        "tokens_per_second": median(one["tokens_per_second"] for one in each),
        "tokens_per_second_of_runs": [one["tokens_per_second"] for one in each],
        "first_token_s": _medians([one["first_token_s"] for one in each]),
        "between_tokens_s": _medians([one["between_tokens_s"] for one in each]),
        "most_waiting": max(one["most_waiting"] for one in each),
        "mean_running": median(one["mean_running"] for one in each),
        "decode_passes": median(one["decode_passes"] for one in each),
        "passes_with_several_trees": median(one["passes_with_several_trees"] for one in each),
        "prompt_passes": median(one["prompt_passes"] for one in each),
        "tokens_per_step": sum((count + 1) * times for count, times in accepted.items()) / steps if steps else None,
        "preemptions": sum(one["preemptions"] for one in each),
        "refused": sum(run.refused for run in runs),
    }


def _of_one(run: Run) -> dict[str, Any]:
    metrics = run.metrics
    running = [running for _, running, _ in run.looks]
    return {
        "tokens_per_second": sum(len(answer.tokens) for answer in run.answers) / run.seconds,
        "first_token_s": _quantiles([answer.first_token_s for answer in run.answers]),
        "between_tokens_s": _quantiles([time for answer in run.answers for time in answer.between_s]),
        "most_waiting": max((waiting for _, _, waiting in run.looks), default=0),
        "mean_running": float(np.mean(running)) if running else 0.0,
        "decode_passes": metrics["decode_passes"],
        "passes_with_several_trees": metrics["tree_passes"],
        "prompt_passes": metrics["prompt_passes"],
        "preemptions": metrics["preemptions"],
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.quantile(values, share)) if values else 0.0 for name, share in QUANTILES.items()}


def _medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: median(one[name] for one in found) for name in QUANTILES}


def to_markdown(results: dict[str, Any]) -> str:
    """Return results as a table, with the conditions in a line above and the checks below."""
    about = results["conditions"]
    head = ", ".join(
        [
            about["model"],
            about["precision"],
            about["device"],
            f"{about['prompts']['count']} prompts of {about['prompts']['file']}",
            f"{about['requests']} requests of up to {about['max_new_tokens']} new tokens",
            f"max_batch {about['max_batch']}, seed {about['seed']}",
            f"median of {about['repeats']}",
            *([f"commit {about['commit']}"] if about["commit"] else []),
            about["date"],
        ]
    )
    lines = [
        "| arrivals | way | tokens/s | to plain | first token s: median, p95, p99 | between tokens ms: the same "
        "| running | passes with several trees | tokens per step |",
        "| --- " * 9 + "|",
    ]
    for level in results["levels"]:
        plain = level["ways"].get("plain")
        for way, found in level["ways"].items():
            ratio = found["tokens_per_second"] / plain["tokens_per_second"] if plain else None
            cells = [
                level["arrivals"],
                way,
                f"{found['tokens_per_second']:.1f}",
                "" if ratio is None else f"{ratio:.2f}",
                ", ".join(f"{found['first_token_s'][name]:.2f}" for name in QUANTILES),
                ", ".join(f"{1e3 * found['between_tokens_s'][name]:.0f}" for name in QUANTILES),
                f"{found['mean_running']:.1f}",
                f"{found['passes_with_several_trees']:g} of {found['decode_passes']:g}",
                "" if found["tokens_per_step"] is None else f"{found['tokens_per_step']:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    check = results["check"]
    told = [
        f"{check['texts']} texts: {check['same']} are those of plain decoding alone, {len(check['ties'])} part from it "
        f"at a tie, {len(check['wrong'])} are wrong"
    ]
    told += [
        f"- {kind} {one['prompt']}, {one['arrivals']}, {one['way']}: new token {one['position']}, gap {one['gap']}"
        for kind in ("ties", "wrong")
        for one in check[kind]
    ]
    return "\n\n".join([head, "\n".join(lines), "\n".join(told)])
