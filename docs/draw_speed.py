"""Draw how fast SmolLM2-135M answers by each peer of one run of `ht-bench peers`, for each number of clients.

python docs/draw_speed.py    # reads docs/measurements/2026-12-01-peers.json, writes docs/speed.svg
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

DOCS = Path(__file__).parent
PICTURE = DOCS / "speed.svg"
RESULTS = DOCS / "measurements" / "2026-12-01-peers.json"
PRECISIONS = {"float32": "float32", "16bit": "16 bits", "8bit": "8 bits", "4bit": "4 bits"}
# Labels on the left, then a column of bars for each number of clients.
WIDTH, ROW, LEFT, COLUMN, ROOM = 860, 23, 190, 335, 45
INK, OTHERS, OURS = "#1f2933", "#8a949e", "#1d7a5f"


def speeds(results: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Return tokens/s of all answers together, the median of the rounds, by clients and entry."""
    rounds: defaultdict[int, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in results["rows"]:
        tokens = sum(answer["tokens"] for answer in row["answers"])
        rounds[row["clients"]][row["entry"]].append(tokens / row["seconds"])
    return {clients: {entry: median(found) for entry, found in entries.items()} for clients, entries in rounds.items()}


def draw() -> str:
    """Return the picture as SVG: entries by precision, the fastest for one client first."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    levels = sorted(speeds(results).items())
    parts = []
    for column, (clients, _) in enumerate(levels):
        title = "one client" if clients == 1 else f"{clients} clients at once"
        x = LEFT + column * COLUMN
        parts.append(_text(x, 30, f"Tokens per second, {title}", 14, INK, weight="bold"))
    y = 42
    for precision, title in PRECISIONS.items():
        parts.append(_text(24, y + 16, title, 13, INK, weight="bold"))
        y += ROW
        entries = [name for name, entry in results["entries"].items() if entry["precision"] == precision]
        for name in sorted(entries, key=lambda name: -levels[0][1][name]):
            entry = results["entries"][name]
            ours = entry["peer"] == "ours"
            weight, colour = ("bold", OURS) if ours else ("normal", OTHERS)
            parts.append(_text(36, y + 14, entry["title"], 13, INK, weight))
            for column, (_, found) in enumerate(levels):
                x, long = LEFT + column * COLUMN, (COLUMN - ROOM) * found[name] / max(found.values())
                parts += [
                    f'<rect x="{x}" y="{y}" width="{long:.1f}" height="{ROW - 5}" rx="3" fill="{colour}"/>',
                    _text(x + round(long, 1) + 6, y + 14, f"{found[name]:.0f}", 12, INK, weight),
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
