"""Results as Markdown: one table for each question, with the conditions in a line above and the checks below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ht_export.bench.settings import PLAIN, PROMPT_LOOKUP, SPECULATIVE, TRANSFORMERS, WITHOUT_NGRAMS

TITLES = {
    SPECULATIVE: "speculative",
    WITHOUT_NGRAMS: "without n-grams",
    TRANSFORMERS: "`transformers`",
    PROMPT_LOOKUP: "`transformers` prompt lookup",
}
DIFFERENCES_SHOWN = 5


def to_markdown(results: dict[str, Any]) -> str:
    """Return the results, as the JSON file has them, as Markdown text. Without any measured there is only a line."""
    parts = [describe(results["conditions"])]
    if not results["overall"]:
        return parts[0]
    groups = {"**overall**": results["overall"], **{task or "(none)": one for task, one in results["tasks"].items()}}
    parts.append(_main_table(groups))
    ways = [name for name in results["overall"]["ways"] if name != PLAIN]
    if len(ways) > 1:
        parts.append("Speed-up over plain decoding:\n\n" + _way_table(groups, ways, "speedup"))
        parts.append("Tokens per step:\n\n" + _way_table(groups, ways, "tokens_per_step"))
    parts.append(_acceptance_table(groups, ways))
    parts.append(_spread(results["overall"], results["conditions"]))
    parts.append("\n".join(_check_lines(results["checks"])))
    return "\n\n".join(part for part in parts if part)


def describe(conditions: dict[str, Any]) -> str:
    """Return what a table must say: model, precision, device, prompts, tree, commit."""
    prompts, engine = conditions["prompts"], conditions["engine"]
    tasks = "" if prompts["tasks"] == "all" else f" ({', '.join(prompts['tasks'])})"
    parts = [
        conditions["model"],
        f"{conditions['precision']} ({engine['file']})",
        conditions["device"],
        "batch 1",
        _sampling(conditions["sampling"]),
        f"{prompts['count']} prompts of {prompts['file']}{tasks}",
        f"{conditions['max_new_tokens']} new tokens",
        _tree(engine["tree"]),
        f"median of {conditions['repeats']}",
        f"commit {conditions['commit']}" if conditions["commit"] else "",
        conditions["date"],
        *(f"continued on {run['date']} with commit {run['commit']}" for run in conditions.get("continued", ())),
    ]
    return ", ".join(filter(None, parts))


def _tree(tree: dict[str, Any]) -> str:
    if tree["adaptive"]:
        return f"trees of adaptive size ({tree['tuning']} tuning)"
    return f"trees of {tree['tree_rows']} rows with {', '.join(map(str, tree['pseudo_rows']))} pseudo rows"


def _sampling(sampling: dict[str, Any]) -> str:
    options = [
        f"{name.replace('_', ' ')} {value:g}"
        for name, value in sampling.items()
        if name not in ("temperature", "seeds") and value not in (None, 1.0)
    ]
    if not sampling["temperature"]:
        return ", ".join(["greedy", *options])
    first, *others = sampling["seeds"]
    seeds = f"seeds {first} to {others[-1]}" if others else f"seed {first}"
    return ", ".join([f"temperature {sampling['temperature']:g}", *options, seeds])


def _main_table(groups: dict[str, dict[str, Any]]) -> str:
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("prompts", lambda one: str(one["prompts"])),
        ("speed-up over plain", lambda one: _number(one["speedup"])),
        ("decode only", lambda one: _number(one["decode_speedup"])),
        ("tokens per step", lambda one: _number(one["tokens_per_step"])),
        ("tokens/s", lambda one: _number(one["tokens_per_second"], 1)),
        ("plain tokens/s", lambda one: _number(one["plain_tokens_per_second"], 1)),
        ("first token, ms", lambda one: _number(1000 * one["time_to_first_token_s"], 0)),
        ("plain, ms", lambda one: _number(1000 * one["plain_time_to_first_token_s"], 0)),
    ]
    if next(iter(groups.values()))["transformers_tokens_per_second"]:
        columns += [
            ("`transformers` float32 tokens/s", lambda one: _number(one["transformers_tokens_per_second"], 1)),
            ("plain / `transformers`", lambda one: _number(one["plain_over_transformers"])),
        ]
    rows = [[task, *(cell(one) for _, cell in columns)] for task, one in groups.items()]
    return markdown(["task", *(title for title, _ in columns)], rows)


def _way_table(groups: dict[str, dict[str, Any]], ways: Sequence[str], figure: str) -> str:
    rows = [[task, *(_number(one["ways"][way][figure]) for way in ways)] for task, one in groups.items()]
    return markdown(["task", *(TITLES.get(way, way) for way in ways)], rows)


def _acceptance_table(groups: dict[str, dict[str, Any]], ways: Sequence[str]) -> str:
    """Return acceptance by depth: of speculative decoding by task, of other ways overall."""
    overall = next(iter(groups.values()))
    found = [(task, one["acceptance"]) for task, one in groups.items()]
    # Ways that draft nothing have no numbers.
    others = [(TITLES.get(way, way), overall["ways"][way]["acceptance"]) for way in ways if way != SPECULATIVE]
    found += [pair for pair in others if pair[1]]
    depths = max(len(shares) for _, shares in found)
    if not depths:
        return "No drafted token was accepted."
    rows = [
        [name, *(_number(shares[depth]) if depth < len(shares) else "-" for depth in range(depths))]
        for name, shares in found
    ]
    return "Steps that accepted so many drafted tokens, of those that accepted one less:\n\n" + markdown(
        ["task", *(str(depth) for depth in range(1, depths + 1))], rows
    )


def _spread(overall: dict[str, Any], conditions: dict[str, Any]) -> str:
    least, most = overall["speedup_range"]
    slowest = overall["slowest"]
    seed = "" if slowest["seed"] is None else f", seed {slowest['seed']}"
    repeats = conditions["repeats"]
    return (
        f"Speed-up by repeat: {least:.2f} to {most:.2f} ({repeats} repeat{'s' if repeats > 1 else ''}). "
        f"Slowest prompt: {slowest['id']} ({slowest['task'] or 'no task'}{seed}), {slowest['speedup']:.2f}."
    )


def _check_lines(checks: dict[str, Any]) -> list[str]:
    lines = []
    for way, check in checks.items():
        against = "the same in every repeat" if way == PLAIN else "that of plain decoding"
        line = f"- {TITLES.get(way, way)}: {check['identical']} of {check['answers']} texts are {against}"
        if check["wrong"]:
            line = f"{line}; **{check['wrong']} wrong**"
        for one in check["differences"][:DIFFERENCES_SHOWN]:
            seed = "" if one["seed"] is None else f", seed {one['seed']}"
            gap = "not possible" if one["gap"] is None else f"gap {one['gap']:.2g}"
            verdict = "wrong" if one["wrong"] else "allowed"
            line += f"\n  - {one['id']}{seed}: differs at new token {one['position']} ({gap}; {verdict})"
        if (more := len(check["differences"]) - DIFFERENCES_SHOWN) > 0:
            line += f"\n  - and {more} more"
        lines.append(line)
    return lines


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with columns of even width, the first one to the left."""
    cells = [[text.replace("|", "\\|") for text in row] for row in [titles, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(titles))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in [cells[0], rule, *cells[1:]]:
        padded = [
            row[0].ljust(widths[0]),
            *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("| " + " | ".join(padded) + " |")
    return "\n".join(lines)
