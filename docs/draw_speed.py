"""Draw how fast SmolLM2-135M answers by each peer of one run of `ht-bench peers`, for each number of clients.

python docs/draw_speed.py    # reads docs/measurements/2026-12-01-peers.json, writes docs/speed.svg
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

DOCS = Path(__file__).parent
PICTURE = DOCS / "speed.svg"
RESULTS = DOCS / "measurements" / "2026-12-01-peers.json"
PRECISIONS = {"float32": "float32", "16bit": "16 bits", "8bit": "8 bits", "4bit": "4 bits"}
# Labels on the left, then a column of bars for each number of clients, all of one scale.
WIDTH, ROW, LEFT, ROOM = 860, 23, 190, 62
INK, OTHERS, OURS = "#1f2933", "#8a949e", "#1d7a5f"


class Bar(NamedTuple):
    """Tokens/s of all answers together, the median of the rounds; `note` is what the number alone would hide."""

    speed: float
    note: str


def bars(results: dict[str, Any]) -> dict[int, dict[str, Bar]]:
    """Return the bars by clients and entry."""
    rounds: defaultdict[int, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    plain = set()
    for row in results["rows"]:
        tokens = sum(answer["tokens"] for answer in row["answers"])
        rounds[row["clients"]][row["entry"]].append(tokens / row["seconds"])
        if row["setting"].get("speculate") is False:
            plain.add((row["clients"], row["entry"]))
    return {
        clients: {
            entry: Bar(median(found), ", plain" if (clients, entry) in plain else "")
            for entry, found in entries.items()
        }
        for clients, entries in sorted(rounds.items())
    }


def draw() -> str:
    """Return the picture as SVG: entries by precision, the fastest for the fewest clients first."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    levels = bars(results)
    longest = [max(bar.speed for bar in found.values()) for found in levels.values()]
    scale = (WIDTH - LEFT - ROOM * len(levels)) / sum(longest)
    columns = [LEFT + ROOM * place + scale * sum(longest[:place]) for place in range(len(levels))]
    parts = []
    for x, clients in zip(columns, levels, strict=True):
        title = "one client" if clients == 1 else f"{clients} clients at once"
        parts.append(_text(x, 30, f"Tokens per second, {title}", 14, INK, weight="bold"))
    y, first = 42, next(iter(levels.values()))
    for precision, title in PRECISIONS.items():
        parts.append(_text(24, y + 16, title, 13, INK, weight="bold"))
        y += ROW
        entries = [name for name, entry in results["entries"].items() if entry["precision"] == precision]
        for name in sorted(entries, key=lambda name: -first[name].speed if name in first else 0.0):
            entry = results["entries"][name]
            weight, colour = ("bold", OURS) if entry["peer"] == "ours" else ("normal", OTHERS)
            parts.append(_text(36, y + 14, escape(entry["title"]), 13, INK, weight))
            for x, found in zip(columns, levels.values(), strict=True):
                bar = found.get(name)
                long, told = (scale * bar.speed, f"{bar.speed:.0f}{bar.note}") if bar else (0, "failed")
                parts += [
                    f'<rect x="{x:.1f}" y="{y}" width="{long:.1f}" height="{ROW - 5}" rx="3" fill="{colour}"/>',
                    _text(round(x + long, 1) + 6, y + 14, told, 12, INK, weight),
                ]
            y += ROW
        y += 5
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 8}" viewBox="0 0 {WIDTH} {y + 8}" '
        'font-family="Helvetica, Arial, sans-serif" role="img">\n<title>Tokens per second of each peer</title>\n'
        f'<rect width="{WIDTH}" height="{y + 8}" rx="10" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, size: int, colour: str, weight: str = "normal") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}">{text}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
