"""Draw how fast SmolLM2-135M answers by each way of one run of `ht-bench run`.

python docs/draw_speed.py    # reads docs/measurements/2026-11-30-yardsticks.json, writes docs/speed.svg
"""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parent
PICTURE = DOCS / "speed.svg"
RESULTS = DOCS / "measurements" / "2026-11-30-yardsticks.json"
# Ways of the run, and what they are called here.
WAYS = {
    "transformers": "transformers",
    "early_exit": "transformers, early exit",
    "prompt_lookup": "transformers, prompt lookup",
    "plain": "this engine, plain decoding",
    "self_speculative": "this engine, self-speculative",
    "text_drafts": "this engine, drafts from the text alone",
    "medusa": "this engine, Medusa-1",
    "speculative": "this engine, hidden transfer",
}
WIDTH, ROW, LEFT = 860, 40, 350
INK, OTHERS, OURS = "#1f2933", "#8a949e", "#1d7a5f"


def draw() -> str:
    """Return the picture as SVG."""
    ways = json.loads(RESULTS.read_text(encoding="utf-8"))["overall"]["ways"]
    speeds = {name: ways[name]["tokens_per_second"] for name in WAYS}
    scale = (WIDTH - LEFT - 70) / max(speeds.values())
    parts = [_text(24, 34, "Tokens per second, prompt included", 17, INK, weight="bold")]
    for place, (name, title) in enumerate(WAYS.items()):
        y, long = 56 + ROW * place, round(scale * speeds[name], 1)
        ours = name == "speculative"
        parts += [
            _text(24, y + 19, title, 14, INK, weight="bold" if ours else "normal"),
            f'<rect x="{LEFT}" y="{y}" width="{long}" height="28" rx="4" fill="{OURS if ours else OTHERS}"/>',
            _text(LEFT + long + 8, y + 19, f"{speeds[name]:.0f}", 14, INK),
        ]
    height = 56 + ROW * len(WAYS) + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif" role="img">\n<title>Tokens per second by way of decoding</title>\n'
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, size: int, colour: str, weight: str = "normal") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}">{text}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
