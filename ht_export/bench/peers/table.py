"""Results of `ht-bench peers` as Markdown: a table for each number of clients, and the settings that were tried."""

from __future__ import annotations

from ht_export.bench.markdown import table
from ht_export.bench.peers.kinds import FLOAT32
from ht_export.bench.peers.measure import best, shown
from ht_export.bench.peers.results import Results
from ht_export.bench.peers.summary import Line, lines

TITLES = (
    "weights",
    "software",
    "setting",
    "tokens/s",
    "least to most",
    "decode only",
    "first token, ms",
    "texts of the float32 model",
    "others part at",
    "peak memory, MB",
    "load, s",
    "files, MB",
)


def to_markdown(results: Results) -> str:
    """Return the results as Markdown text; what was left out, or failed, is told too."""
    parts = [_describe(results)]
    for clients, level in lines(results).items():
        head = "One client:" if clients == 1 else f"{clients} clients at once, tokens/s of all together:"
        parts.append(f"{head}\n\n{table(TITLES, [_row(line) for line in level])}")
    if results.tried:
        parts.append("Settings tried, the one that was taken in bold:\n\n" + "\n".join(_tried(results)))
    if results.entries:
        versions = [f"- {name}: {entry.version}; {entry.form}" for name, entry in results.entries.items()]
        parts.append("Versions, and what was run:\n\n" + "\n".join(versions))
    told = [f"- left out: {one}" for one in results.left_out] + [f"- failed: {one}" for one in results.failed]
    if told:
        parts.append("\n".join(told))
    if not results.complete:
        parts.append("Not complete: the same command goes on.")
    return "\n\n".join(parts)


def _row(line: Line) -> list[str]:
    exact = line.same == line.texts
    return [
        line.entry.precision,
        line.entry.title,
        shown(line.setting),
        f"{line.tokens_per_second:.1f}",
        f"{line.least:.1f} to {line.most:.1f}" if line.rounds > 1 else "one round",
        f"{line.decode_tokens_per_second:.1f}",
        f"{1e3 * line.first_s:.0f}",
        f"{line.same} of {line.texts}" + (", exact" if exact and line.entry.precision == FLOAT32 else ""),
        "-" if line.parts_at is None else f"token {line.parts_at:g}",
        f"{line.peak_bytes / 1e6:.0f}",
        f"{line.load_s:.1f}",
        f"{line.entry.file_bytes / 1e6:.0f}" if line.entry.file_bytes else "-",
    ]


def _tried(results: Results) -> list[str]:
    found = []
    for entry, clients in dict.fromkeys((one.entry, one.clients) for one in results.tried):
        settings = results.settings_of(entry, clients)
        chosen = best(settings)
        told = []
        for one in settings:
            text = f"{shown(one.setting)}: " + ("failed" if one.cause else f"{one.tokens_per_second:.1f} tokens/s")
            told.append(f"**{text}**" if one is chosen else text)
        found.append(f"- {entry}, {clients} client{'s' if clients > 1 else ''}: {'; '.join(told)}")
    return found


def _describe(results: Results) -> str:
    about = results.conditions
    parts = [
        about["model"],
        about["device"],
        f"{about['prompts']['count']} prompts of {about['prompts']['file']}",
        f"up to {about['max_new_tokens']} new tokens, greedy",
        f"median of {about['rounds']} rounds, in turns, a process each",
        f"commit {about['commit']}" if about["commit"] else "",
        about["date"],
        *(f"continued on {run['date']} with commit {run['commit']}" for run in about.get("continued", ())),
    ]
    return ", ".join(part for part in parts if part)
