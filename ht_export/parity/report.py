"""A parity report: as Markdown, as a page of HTML, as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ht_export.parity.stages import MEANING, OF_A_LAYER, Comparison, place
from ht_export.parity.text import Divergence, TextSummary

DIVERGENCES_SHOWN = 10
# Precisions whose weights are rounded, so that the stages are not those of one model.
QUANTISED = ("int8", "int4", "fp8")

Row = Sequence[str]


@dataclass(frozen=True)
class Report:
    """All comparisons of a run, and its `conditions`; `text` is None where no prompts were answered."""

    conditions: dict[str, Any]
    stages: list[Comparison]
    text: TextSummary | None

    @property
    def faults(self) -> list[str]:
        """All that is wrong, a sentence each."""
        found = []
        for stage in self.stages:
            if (wrong := stage.wrong) is not None:
                beyond = f"{wrong.relative:.1e} of the largest value, and {stage.tolerance:.0e} is allowed"
                reason = MEANING.get(wrong.output)
                found.append(
                    f"{stage.name} parts from {stage.against} at {place(wrong)}: {beyond} ({wrong.case})"
                    + (f"; look at {reason}" if reason else "")
                )
        if self.text and self.text.wrong:
            found.append(
                f"{len(self.text.wrong)} of {len(self.text.prompts)} texts differ by more than rounding explains "
                f"(first: {self.text.wrong[0].prompt})"
            )
        return found

    def to_dict(self, per_layer: bool) -> dict[str, Any]:
        """Return the report for JSON."""
        stages = []
        for stage in self.stages:
            described = {name: value for name, value in asdict(stage).items() if name != "deviations"}
            described["wrong"] = asdict(stage.wrong) if stage.wrong else None
            described["outputs"] = [asdict(one) for one in (stage.deviations if per_layer else _by_output(stage))]
            stages.append(described)
        return {
            "conditions": self.conditions,
            "holds": not self.faults,
            "faults": self.faults,
            "stages": stages,
            "text": None if self.text is None else _summary(self.text),
        }

    def tables(self, per_layer: bool) -> list[tuple[str, Row, list[Row]]]:
        """Return the tables: title, head and rows of each."""
        head = ("stage", "against", "largest", "mean", "relative", "allowed", "where")
        found: list[tuple[str, Row, list[Row]]] = [("Stages", head, _stage_rows(self))]
        if per_layer:
            for stage in self.stages:
                if rows := _layer_rows(stage):
                    found.append((f"{stage.name}, by layer", ("layer", *OF_A_LAYER), rows))
        if self.text:
            found.append(
                ("Text", ("", "same", "tokens before they part", "explained by rounding"), _text_rows(self.text))
            )
            if divergences := list(_divergence_rows(self.text)):
                head = ("prompt", "of", "new token, from 0", "both tokens", "gap", "allowed", "explained by rounding")
                found.append(("Where texts part", head, divergences))
        return found

    def verdict(self) -> str:
        """Return the outcome in a line, or one line for each fault."""
        return "\n".join(f"WRONG: {fault}" for fault in self.faults) or "Parity holds."

    def notes(self) -> list[str]:
        """Return what tables do not say."""
        notes = [f"{stage.name}: not run, {stage.skipped}" for stage in self.stages if stage.skipped]
        if self.text and self.text.prompts:
            prompts = self.text.prompts
            notes.append(
                f"The logits of the same tokens differ by at most {max(one.logit_error for one in prompts):.1e} from "
                f"those of transformers, and by {max(one.self_error for one in prompts):.1e} between passes of one row "
                f"and of several; {sum(one.flips for one in prompts)} of {sum(one.tokens for one in prompts)} tokens "
                "of plain decoding would be others in passes of several rows."
            )
        if self.conditions.get("precision") in QUANTISED:
            notes.append(
                f"{self.conditions['precision']} rounds the weights: the engine is another model than the one it is "
                "compared with, whose texts part early. That they are explained by rounding says nothing of how good "
                "they are; for the same text, export with --precision fp32."
            )
        return notes


def to_markdown(report: Report, per_layer: bool) -> str:
    """Return the report as Markdown."""
    parts = ["# Parity", _line(report.conditions), report.verdict()]
    for title, head, rows in report.tables(per_layer):
        lines = [head, ["---"] * len(head), *rows]
        table = (f"| {' | '.join(map(_escaped, row))} |" for row in lines)
        parts.append(f"## {title}\n\n" + "\n".join(table))
    return "\n\n".join([*parts, *report.notes()]) + "\n"


def to_html(report: Report, per_layer: bool) -> str:
    """Return the report as a page that needs nothing else."""
    from jinja2 import Environment

    return (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            line=_line(report.conditions),
            verdict=report.verdict(),
            holds=not report.faults,
            tables=report.tables(per_layer),
            notes=report.notes(),
        )
    )


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Parity</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border-bottom: 1px solid #ccc; padding: .2em .8em; text-align: left; font-variant-numeric: tabular-nums; }
.holds { color: #176b2c; } .wrong { color: #b00020; white-space: pre-line; }
</style>
<h1>Parity</h1>
<p>{{ line }}</p>
<p class="{{ 'holds' if holds else 'wrong' }}"><strong>{{ verdict }}</strong></p>
{% for title, head, rows in tables %}
<h2>{{ title }}</h2>
<table>
<tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
{% for note in notes %}<p>{{ note }}</p>
{% endfor %}"""


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _line(conditions: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in conditions.items() if value is not None)


def _stage_rows(report: Report) -> list[Row]:
    rows: list[Row] = []
    for stage in report.stages:
        worst = stage.worst
        if worst is None:
            rows.append((stage.name, stage.against, "", "", "", "", "not run"))
            continue
        mean = max(one.mean for one in stage.deviations)
        largest = max(one.largest for one in stage.deviations)
        numbers = (f"{largest:.1e}", f"{mean:.1e}", f"{worst.relative:.1e}", f"{stage.tolerance:.0e}")
        rows.append((stage.name, stage.against, *numbers, place(stage.wrong or worst)))
    return rows


def _layer_rows(stage: Comparison) -> list[Row]:
    found: dict[int, dict[str, float]] = {}
    for one in stage.deviations:
        if one.layer is not None:
            of_layer = found.setdefault(one.layer, {})
            of_layer[one.output] = max(one.relative, of_layer.get(one.output, 0.0))
    return [
        (str(layer), *(f"{found[layer][name]:.1e}" if name in found[layer] else "" for name in OF_A_LAYER))
        for layer in sorted(found)
    ]


def _text_rows(text: TextSummary) -> list[Row]:
    rows: list[Row] = []
    for title, which in (("plain / transformers", "from_transformers"), ("speculative / plain", "from_plain")):
        parted = [getattr(one, which) for one in text.prompts if getattr(one, which)]
        explained = f"{sum(one.explained for one in parted)} of {len(parted)}" if parted else ""
        same = f"{text.same(which)} of {len(text.prompts)}"
        rows.append((title, same, f"{text.agreement(which):.1%}", explained))
    return rows


def _divergence_rows(text: TextSummary) -> Iterable[Row]:
    found: list[tuple[str, str, Divergence]] = [
        (one.prompt, title, divergence)
        for title, which in (("plain / transformers", "from_transformers"), ("speculative / plain", "from_plain"))
        for one in text.prompts
        if (divergence := getattr(one, which))
    ]
    # Unexplained divergences come first.
    found.sort(key=lambda one: one[2].explained)
    for prompt, title, divergence in found[:DIVERGENCES_SHOWN]:
        explained = "yes" if divergence.explained else "no"
        # Spaces are part of a token, and the end of a line would end the table.
        tokens = " / ".join(map(repr, divergence.tokens))
        numbers = (f"{divergence.gap:.1e}", f"{divergence.allowed:.1e}")
        yield (prompt, title, str(divergence.position), tokens, *numbers, explained)


def _by_output(stage: Comparison) -> list[Any]:
    """Return the largest deviation of each output."""
    names = dict.fromkeys(one.output for one in stage.deviations)
    return [max(stage.output(name), key=lambda one: one.relative) for name in names]


def _summary(text: TextSummary) -> dict[str, Any]:
    return {
        "same_as_transformers": text.same("from_transformers"),
        "agreement_with_transformers": text.agreement("from_transformers"),
        "same_as_plain": text.same("from_plain"),
        "agreement_with_plain": text.agreement("from_plain"),
        "prompts": [asdict(one) for one in text.prompts],
    }
