"""Ours beside other ways of drafting, in one table: how many times as fast, by task and overall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ht_export.bench.markdown import number, table
from ht_export.bench.settings import OF_TRANSFORMERS, SPECULATIVE
from ht_export.bench.table import TITLES, describe
from runtime.files import atomic_path


def yardsticks(results: dict[str, Any]) -> str:
    """Return the results, as the JSON file has them, as a Markdown table with what was measured and how."""
    lines = [describe(results["conditions"]), f"`{results['conditions']['command']}`"]
    if not results["overall"]:
        return "\n\n".join(lines)
    groups = {"**overall**": results["overall"], **{task or "(none)": one for task, one in results["tasks"].items()}}
    names = list(results["overall"]["ratios"])
    titles = ["task", "prompts", "ours, tokens per step", *(TITLES.get(name, name) for name in names)]
    rows = [
        [
            task,
            str(one["prompts"]),
            number(one["ways"][SPECULATIVE]["tokens_per_step"]),
            *(_cell(one, name) for name in names),
        ]
        for task, one in groups.items()
    ]
    rows.append(["texts equal", "", *(_equal(results["checks"], name) for name in (SPECULATIVE, *names))])
    lines.append(table(titles, rows))
    lines.append(_explained(names, results["conditions"]))
    return "\n\n".join(lines) + "\n"


def write_yardsticks(results: dict[str, Any], path: Path) -> None:
    """Write the table, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(yardsticks(results), encoding="utf-8")


def _cell(group: dict[str, Any], name: str) -> str:
    ratio = group["ratios"][name]
    own = number(group["ways"][name]["tokens_per_step"])
    if name not in OF_TRANSFORMERS:
        return f"{number(ratio['speed'])} ({own})"
    return f"{number(ratio['speedup'])}; {number(ratio['speed'])} ({own})"


def _equal(checks: dict[str, Any], name: str) -> str:
    check = checks.get(name)
    if check is None:
        return "-"
    return f"{check['identical']} of {check['answers']}" + (f", {check['wrong']} wrong" if check["wrong"] else "")


def _explained(names: Sequence[str], conditions: dict[str, Any]) -> str:
    said = [
        "How many times as fast as each way ours is (tokens/s, prompt processing included); in brackets the way's own "
        "tokens per pass of the whole model."
    ]
    if any(name in OF_TRANSFORMERS for name in names):
        said.append(
            "Ways of `transformers` run in PyTorch: first comes our speed-up over plain decoding over theirs, each in "
            "its own engine, then the tokens/s."
        )
    if skipped := conditions.get("self_speculative"):
        said.append(
            f"Self-speculative: drafts without {len(skipped['attention'])} attention and {len(skipped['mlp'])} MLP "
            f"blocks, up to {skipped['draft_tokens']} tokens in a row until one has less than "
            f"{skipped['confidence']:g}."
        )
    if layers := conditions.get("early_exit"):
        said.append(f"Early exit: drafts of the first {layers} layers.")
    said += [
        f"{name}: {engine['file']}, {_drafter(engine)} at {', '.join(map(str, engine['transfer_layers']))}."
        for name, engine in conditions["compared"].items()
    ]
    return " ".join(said)


def _drafter(engine: dict[str, Any]) -> str:
    return "Medusa heads" if engine.get("drafter") == "medusa" else "transfer layers"
