"""Draw how fast SmolLM2-135M answers by each peer of one run of `ht-bench peers`, for each number of clients.

python docs/draw_speed.py    # reads docs/measurements/2026-12-01-peers.json, writes docs/speed.svg
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

from ht_export.bench.peers import kinds
from ht_export.bench.peers.results import RESULTS, Results
from ht_export.bench.peers.summary import Line, lines

DOCS = Path(__file__).parent
PICTURE = DOCS / "speed.svg"
RAW = DOCS / "measurements" / "2026-12-01-peers.json"
PRECISIONS = {"float32": "float32", "16bit": "16 bits", "8bit": "8 bits", "4bit": "4 bits"}
# Labels on the left, then a column of bars for each number of clients, all of one scale.
WIDTH, ROW, LEFT, ROOM = 860, 23, 190, 62
INK, OTHERS, OURS = "#1f2933", "#8a949e", "#1d7a5f"


def measured() -> dict[int, dict[str, Line]]:
    """Return what was measured, by number of clients and entry."""
    found = RESULTS.read(RAW)
    levels = lines(Results(None, found.conditions, entries=found.entries, rows=found.rows))
    return {clients: {line.name: line for line in level} for clients, level in levels.items()}


def draw() -> str:
    """Return the picture as SVG: entries by precision, the fastest for the fewest clients first."""
    levels = measured()
    longest = [max(line.tokens_per_second for line in found.values()) for found in levels.values()]
    scale = (WIDTH - LEFT - ROOM * len(levels)) / sum(longest)
    columns = [LEFT + ROOM * place + scale * sum(longest[:place]) for place in range(len(levels))]
    parts = []
    for x, clients in zip(columns, levels, strict=True):
        title = "one client" if clients == 1 else f"{clients} clients at once"
        parts.append(_text(x, 30, f"Tokens per second, {title}", 14, INK, weight="bold"))
    y = 42
    entries = {name: line.entry for found in levels.values() for name, line in found.items()}
    for precision, title in PRECISIONS.items():
        parts.append(_text(24, y + 16, title, 13, INK, weight="bold"))
        y += ROW
        for name, entry in entries.items():
            if entry.precision != precision:
                continue
            weight, colour = ("bold", OURS) if entry.peer == kinds.OURS.name else ("normal", OTHERS)
            parts.append(_text(36, y + 14, escape(entry.title), 13, INK, weight))
            for x, found in zip(columns, levels.values(), strict=True):
                parts += _bar(x, y, scale, found.get(name), colour, weight)
            y += ROW
        y += 5
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 8}" viewBox="0 0 {WIDTH} {y + 8}" '
        'font-family="Helvetica, Arial, sans-serif" role="img">\n<title>Tokens per second of each peer</title>\n'
        f'<rect width="{WIDTH}" height="{y + 8}" rx="10" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _bar(x: float, y: int, scale: float, line: Line | None, colour: str, weight: str) -> list[str]:
    if line is None:
        return [_text(x + 6, y + 14, "failed", 12, INK, weight)]
    long = scale * line.tokens_per_second
    # A number of ours alone would not tell that nothing was drafted.
    told = f"{line.tokens_per_second:.0f}" + (", plain" if line.setting.get("speculate") is False else "")
    return [
        f'<rect x="{x:.1f}" y="{y}" width="{long:.1f}" height="{ROW - 5}" rx="3" fill="{colour}"/>',
        _text(round(x + long, 1) + 6, y + 14, told, 12, INK, weight),
    ]


def _text(x: float, y: float, text: str, size: int, colour: str, weight: str = "normal") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}">{text}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
