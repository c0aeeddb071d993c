"""Tables and numbers in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with so many digits after the point; a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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
