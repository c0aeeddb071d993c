"""The report of a fit in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ht_export.training.recipe.worth import Interval
from runtime.errors import one_line

CAPTIONS = {
    "loss.png": "Training loss over optimizer steps",
    "top_over_steps.png": "Held-out top-1/2/4/8 over optimizer steps",
    "tokens_per_step.png": "Tokens per step by tree rows, held-out text",
    "calibration.png": "How often drafts are right, by the probability that they state",
    "acceptance.png": "Held-out top-1/2/4/8 by draft step",
    "ranks.png": "Acceptance by rank of the candidate",
    "texts.png": "Tokens per step by the number of texts trained on; dotted: extrapolated",
}

# Fewer texts, resampled, say nothing of how sure a number is.
FEWEST_TEXTS = 10


def markdown(found: dict[str, Any], plots: Sequence[str]) -> str:
    """Return the report of the numbers `found`, with the `plots` that there are beside it."""
    acceptance = found["acceptance"]
    head = f"a draft head of {found['draft_size']} tokens" if found["draft_size"] else "the whole vocabulary"
    lines = [
        f"# Transfer layers for {one_line(found['model'])}",
        "",
        f"Layers {','.join(map(str, found['layers']))}, drafts from {head}, trained on a folder of "
        f"{found['texts']} texts. All numbers are of text that was kept apart, but where it says otherwise.",
        "",
        *_speed(found["speedup"]),
        "",
        "## Drafts",
        "",
        f"| draft step | {' | '.join(f'top {n}' for n in acceptance['top'])} | KL, nats |",
        "| ---: |" + " ---: |" * (len(acceptance["top"]) + 1),
        *(
            f"| {k + 1} | {' | '.join(f'{shares[k]:.3f}' for shares in acceptance['top'].values())} | {kl:.3f} |"
            for k, kl in enumerate(acceptance["kl"])
        ),
        "",
        f"| tree rows | {' | '.join(acceptance['tokens_per_step'])} |",
        "| --- |" + " ---: |" * len(acceptance["tokens_per_step"]),
        f"| tokens per step | {' | '.join(f'{value:.2f}' for value in acceptance['tokens_per_step'].values())} |",
        "",
        "Top n of a later step is given that the steps before were right.",
        "",
        *_more_data(found),
        "",
    ]
    for name in CAPTIONS:
        if name in plots:
            lines += [f"![{CAPTIONS[name]}]({name})", ""]
    return "\n".join(lines)


def _speed(speedup: dict[str, Any]) -> list[str]:
    cost = speedup["row_cost"]
    pseudo = ",".join(map(str, speedup["pseudo_rows"]))
    return [
        "## Expected speed-up",
        "",
        f"**{speedup['speedup']:.2f}** times plain decoding of one request: {speedup['tokens_per_step']:.2f} tokens "
        f"per step with {speedup['tree_rows']} tree rows and {pseudo} pseudo rows, in passes that take "
        f"{speedup['cost']:.2f} times as long as a plain one. That counts {cost['value']:.3f} plain passes for each "
        f"further row ({one_line(cost['source'], 200)}), the same size at every step, greedy decoding and no text that "
        "repeats: sizes chosen step by step and drafts from text make it more, prompts and what happens between passes "
        "make it less. `ht-bench run` measures it.",
    ]


def _more_data(found: dict[str, Any]) -> list[str]:
    lines = ["## What more data would bring", ""]
    rates = found["gap"]["tokens_per_step"]
    counts = found["gap"]["texts"]
    lines += ["| tree rows | texts trained on | held-out texts | gap |", "| ---: | --- | --- | --- |"]
    for rows, values in rates.items():
        shown = (str(Interval(**values[name])) for name in ("trained_on", "held_out", "gap"))
        lines.append(f"| {rows} | {' | '.join(shown)} |")
    kl = found["gap"]["kl"]
    lines += [
        "",
        f"Tokens per step on {counts['trained_on']} of the texts trained on and {counts['held_out']} held-out ones, "
        "with intervals of 95 % (texts resampled). KL by draft step: "
        f"{_listed(kl['trained_on'])} and {_listed(kl['held_out'])} nats.",
        "",
        _verdict(Interval(**rates["32"]["gap"])) if min(counts.values()) >= FEWEST_TEXTS else _too_few(counts),
    ]
    if curve := found["learning_curve"]:
        lines += ["", "| texts | tokens per step, 32 rows | |", "| ---: | --- | --- |"]
        for place, point in enumerate(curve["points"]):
            told = "measured" if place < curve["measured"] else "extrapolated"
            value = Interval(point["value"], point["low"], point["high"])
            lines.append(f"| {point['texts']} | {value} | {told} |")
        lines += [
            "",
            "Extrapolated along a straight line over the logarithm of the number of texts. The intervals are of the "
            "held-out texts alone: fits vary by themselves, all had the same number of steps, and curves flatten, so "
            "that ten times the texts may bring less.",
        ]
    else:
        lines += ["", "`--curve` fits parts of the texts too, and extrapolates."]
    return lines


def _verdict(gap: Interval) -> str:
    if gap.low > 0:
        return (
            f"Texts trained on have {gap} tokens per step more at 32 rows than others: what was learned by heart. More "
            "texts of the same kinds close that gap from both sides, so that they bring some of it, and no more than "
            "about all of it at this number of steps."
        )
    return (
        f"No gap is to be seen at 32 rows ({gap}): more texts alone bring little, and more steps more. Both sets may "
        "be too small to tell."
    )


def _too_few(counts: dict[str, int]) -> str:
    return (
        f"These are too few texts to tell: resampling needs {FEWEST_TEXTS} of either kind, else its intervals look "
        f"surer than they are (that of one text has no width), and here are {counts['trained_on']} and "
        f"{counts['held_out']}. Measure on more: name a file of prompts with `--held-out`."
    )


def _listed(values: Sequence[float]) -> str:
    return "/".join(f"{value:.2f}" for value in values)
