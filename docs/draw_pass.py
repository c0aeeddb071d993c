"""Draw one pass: a tree of five candidates, its pseudo rows and its mask, as the runtime lays them out.

python docs/draw_pass.py    # writes docs/pass.svg
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runtime.rows import Rows, lay_out
from runtime.tree import Tree

PICTURE = Path(__file__).with_name("pass.svg")

# The example of the documents and of the tests. After a text of ten tokens the certain one is "the", id 7.
WORDS = ("the", "cat", "dog", "sat", "is")
TREE = Tree(
    tokens=np.array([7, 3, 8, 4, 5]),
    parents=np.array([-1, 0, 0, 1, 1]),
    depths=np.array([0, 1, 1, 2, 2]),
    probabilities=np.array([1.0, 0.6, 0.3, 0.2, 0.3]),
)
START = 10
# Two draft steps: the first for "cat" and "is", the second for "is".
PSEUDO_PARENTS = (np.array([1, 4]), np.array([4]))
JOIN_ORDER = (0, 1)
# What the base model chooses: "cat" after "the", "is" after "cat", and then a word that is no candidate.
ACCEPTED, CHOSEN = (0, 1, 4), "asleep"

WIDTH, HEIGHT = 960, 484
CELL, TOP, LEFT = 30, 128, 610
INK, SOFT, FAINT = "#1f2933", "#5f6b76", "#d5dae0"
KEPT, REJECTED, DRAFT = "#1d7a5f", "#8a949e", "#d0742a"
STEP_NAMES = ("+1", "+2")


def example_rows() -> Rows:
    """Return the rows of the example."""
    return lay_out(TREE, PSEUDO_PARENTS, JOIN_ORDER, START)


def row_names() -> list[str]:
    """Return what each row is of: a candidate's word, or a candidate's word and the draft step."""
    return [*WORDS, *(f"{WORDS[parent]} {STEP_NAMES[step]}" for step in JOIN_ORDER for parent in PSEUDO_PARENTS[step])]


def draw() -> str:
    """Return the picture as SVG."""
    body = "\n".join([*_tree(), *_mask(example_rows(), row_names()), *_outcome()])
    title = "One pass of hidden-transfer decoding: a tree of guesses, its mask, and what is kept"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="14" fill="{INK}" role="img">\n<title>{title}</title>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="white"/>\n{body}\n</svg>\n'
    )


def _tree() -> list[str]:
    """Draw the candidates, and beside them their pseudo rows."""
    places = {0: (64, 210), 1: (176, 160), 2: (176, 270), 3: (288, 110), 4: (288, 210)}
    parts = _heading(24, 1, "A tree of guesses", "what may follow the text so far: … the")
    for node, parent in enumerate(TREE.parents.tolist()):
        if parent >= 0:
            kept = node in ACCEPTED
            parts.append(_line(places[parent], places[node], KEPT if kept else REJECTED, 4 if kept else 1.5))
    for step, parents in enumerate(PSEUDO_PARENTS):
        for parent in parents.tolist():
            x, y = places[parent]
            # Right of "cat" are its children: its pseudo row is above it.
            across, up = (0, 62) if parent == 1 else (92, 0)
            place = (x + across * (step + 1), y - up * (step + 1))
            parts.append(_line((x + across * step, y - up * step), place, DRAFT, 1.5, dashed=True))
            parts.append(_box(place, STEP_NAMES[step], DRAFT, width=44))
    for node, word in enumerate(WORDS):
        parts.append(_box(places[node], word, KEPT if node in ACCEPTED else REJECTED))
    legend = (
        (KEPT, "the base model chooses this itself: kept"),
        (REJECTED, "it chooses something else: dropped, no harm done"),
        (DRAFT, "pseudo rows: they guess what comes next, in the same pass"),
    )
    for line, (colour, text) in enumerate(legend):
        y = 326 + 24 * line
        parts.append(f'<rect x="24" y="{y - 11}" width="14" height="14" rx="3" fill="{colour}"/>')
        parts.append(_text(46, y, text, colour=SOFT))
    return parts


def _mask(rows: Rows, names: list[str]) -> list[str]:
    """Draw which row sees which, and each row's position."""
    parts = _heading(
        LEFT - 80, 2, "One forward pass, under a mask", "a row sees the filled columns, and all of the text"
    )
    for column, name in enumerate(names):
        x = LEFT + column * CELL + CELL // 2 + 4
        parts.append(f'<text x="{x}" y="{TOP - 8}" font-size="13" transform="rotate(-50 {x} {TOP - 8})">{name}</text>')
    parts.append(_text(LEFT + 8 * CELL + 12, TOP - 8, "position", size=13, colour=SOFT))
    for row, name in enumerate(names):
        y = TOP + row * CELL
        parts.append(_text(LEFT - 80, y + 20, name))
        parts.append(_text(LEFT + 8 * CELL + 28, y + 20, str(rows.position_ids[row]), colour=SOFT))
        colour = DRAFT if row >= len(WORDS) else KEPT if row in ACCEPTED else REJECTED
        for column in range(len(names)):
            fill = colour if rows.tree_mask[row, column] else "white"
            parts.append(
                f'<rect x="{LEFT + column * CELL}" y="{y}" width="{CELL}" height="{CELL}" fill="{fill}" '
                f'stroke="{FAINT}"/>'
            )
    return parts


def _outcome() -> list[str]:
    """Draw what the pass brought."""
    words = [*(WORDS[node] for node in ACCEPTED[1:]), CHOSEN]
    y = 420
    parts = [f'<line x1="24" y1="{y - 16}" x2="{WIDTH - 24}" y2="{y - 16}" stroke="{FAINT}"/>']
    parts += _heading(24, 3, f"{len(words)} tokens for one pass", "the text goes on as plain decoding would", y + 16)
    x = 390
    parts.append(_text(x - 46, y + 32, "… the", size=16))
    for word in words:
        parts.append(_box((x + 45, y + 27), word, KEPT, width=74))
        x += 84
    parts.append(_text(x + 14, y + 22, f"“{CHOSEN}” is the model's own choice after “is”;", size=13, colour=SOFT))
    parts.append(_text(x + 14, y + 40, "“is +1” and “is +2” draft the next tree.", size=13, colour=SOFT))
    return parts


def _heading(x: int, number: int, text: str, below: str, y: int = 34) -> list[str]:
    return [
        f'<circle cx="{x + 11}" cy="{y - 5}" r="12" fill="{INK}"/>',
        f'<text x="{x + 11}" y="{y}" text-anchor="middle" font-weight="bold" fill="white">{number}</text>',
        f'<text x="{x + 32}" y="{y}" font-size="17" font-weight="bold">{text}</text>',
        _text(x + 32, y + 20, below, size=13, colour=SOFT),
    ]


def _line(start: tuple[int, int], end: tuple[int, int], colour: str, width: float, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<line x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}" stroke="{colour}" '
        f'stroke-width="{width}"{dash}/>'
    )


def _box(place: tuple[int, int], text: str, colour: str, width: int = 60) -> str:
    x, y = place
    return (
        f'<rect x="{x - width // 2}" y="{y - 16}" width="{width}" height="32" rx="8" fill="{colour}"/>'
        f'<text x="{x}" y="{y + 5}" text-anchor="middle" fill="white">{text}</text>'
    )


def _text(x: int, y: int, text: str, size: int = 14, colour: str = INK) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}">{text}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
