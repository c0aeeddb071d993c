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

CELL = 30
TOP, LEFT = 96, 530
INK, FAINT, TREE_FILL, PSEUDO_FILL = "#222222", "#d9d9d9", "#3b6ea5", "#d98032"
STEP_NAMES = ("+1", "+2")


def example_rows() -> Rows:
    """Return the rows of the example."""
    return lay_out(TREE, PSEUDO_PARENTS, JOIN_ORDER, START)


def row_names() -> list[str]:
    """Return what each row is of: a candidate's word, or a candidate's word and the draft step."""
    return [*WORDS, *(f"{WORDS[parent]} {STEP_NAMES[step]}" for step in JOIN_ORDER for parent in PSEUDO_PARENTS[step])]


def draw() -> str:
    """Return the picture as SVG."""
    parts = [*_tree(), *_mask(example_rows(), row_names())]
    width, height = LEFT + 8 * CELL + 110, TOP + 8 * CELL + 64
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="14" fill="{INK}">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )


def _tree() -> list[str]:
    """Draw the candidates, and right of each its pseudo rows."""
    places = {0: (52, 200), 1: (145, 150), 2: (145, 255), 3: (238, 105), 4: (238, 195)}
    parts = [_text(30, 30, "The tree to verify, and where to draft", size=16)]
    for node, parent in enumerate(TREE.parents.tolist()):
        if parent >= 0:
            parts.append(_line(places[parent], places[node], INK))
    for step, parents in enumerate(PSEUDO_PARENTS):
        for parent in parents.tolist():
            x, y = places[parent]
            # Right of "cat" are its children: its pseudo row is above it.
            across, up = (0, 68) if parent == 1 else (68, 0)
            before = (x + across * step, y - up * step)
            place = (x + across * (step + 1), y - up * (step + 1))
            parts.append(_line(before, place, PSEUDO_FILL, dashed=True))
            parts.append(_circle(place, STEP_NAMES[step], PSEUDO_FILL))
    parts += [_circle(places[node], word, TREE_FILL) for node, word in enumerate(WORDS)]
    parts.append(_text(30, 320, "blue: candidates, T = 5; the root is certain"))
    parts.append(_text(30, 342, "orange: pseudo rows, R1 = 2 and R2 = 1"))
    return parts


def _mask(rows: Rows, names: list[str]) -> list[str]:
    """Draw which row sees which, and each row's position."""
    parts = [_text(LEFT - 70, 30, "The mask: a row sees the filled columns", size=16)]
    for column, name in enumerate(names):
        x = LEFT + column * CELL + CELL // 2 + 4
        parts.append(f'<text x="{x}" y="{TOP - 8}" transform="rotate(-50 {x} {TOP - 8})">{name}</text>')
    parts.append(_text(LEFT + 8 * CELL + 12, TOP - 8, "position"))
    for row, name in enumerate(names):
        y = TOP + row * CELL
        parts.append(_text(LEFT - 70, y + 20, name))
        parts.append(_text(LEFT + 8 * CELL + 32, y + 20, str(rows.position_ids[row])))
        for column in range(len(names)):
            sees = bool(rows.tree_mask[row, column])
            fill = (TREE_FILL if row < len(WORDS) else PSEUDO_FILL) if sees else "white"
            parts.append(
                f'<rect x="{LEFT + column * CELL}" y="{y}" width="{CELL}" height="{CELL}" fill="{fill}" '
                f'stroke="{FAINT}"/>'
            )
    parts.append(_text(LEFT - 70, TOP + 8 * CELL + 28, "Every row sees the ten cached tokens, 0 to 9, as well."))
    return parts


def _line(start: tuple[int, int], end: tuple[int, int], colour: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}" stroke="{colour}"{dash}/>'


def _circle(place: tuple[int, int], text: str, colour: str) -> str:
    x, y = place
    return (
        f'<circle cx="{x}" cy="{y}" r="22" fill="{colour}"/>'
        f'<text x="{x}" y="{y + 5}" text-anchor="middle" fill="white">{text}</text>'
    )


def _text(x: int, y: int, text: str, size: int = 14) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}">{text}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
