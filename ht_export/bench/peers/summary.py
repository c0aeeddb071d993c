"""What the measurements of peers come to: medians over rounds, and whether the texts are the float32 model's own."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ht_export.bench.peers.kinds import PRECISIONS
from ht_export.bench.peers.results import Entry, Measured, Results, Scalar


@dataclass(frozen=True)
class Line:
    """One entry for so many clients. `tokens_per_second` is of all prompts together, with the least and the most of the
    rounds; the others are medians over the rounds; `same` of `texts` are the float32 model's own, and the others part
    from it at the new token `parts_at` (the median).
    """

    name: str
    entry: Entry
    clients: int
    setting: dict[str, Scalar]
    rounds: int
    tokens_per_second: float
    least: float
    most: float
    decode_tokens_per_second: float
    first_s: float
    load_s: float
    peak_bytes: float
    same: int
    texts: int
    parts_at: float | None


def lines(results: Results) -> dict[int, list[Line]]:
    """Return the lines by number of clients: by precision, and the fastest first."""
    found: dict[int, list[Line]] = {}
    for clients in sorted({row.clients for row in results.rows}):
        rows = [row for row in results.rows if row.clients == clients]
        names = list(dict.fromkeys(row.entry for row in rows))
        level = [_line(name, results.entries[name], [row for row in rows if row.entry == name]) for name in names]
        order = {precision: place for place, precision in enumerate(PRECISIONS)}
        found[clients] = sorted(
            level, key=lambda line: (order.get(line.entry.precision, len(order)), -line.tokens_per_second)
        )
    return found


def _line(name: str, entry: Entry, rows: Sequence[Measured]) -> Line:
    speeds = [sum(answer.tokens for answer in row.answers) / row.seconds for row in rows]
    answers = [answer for row in rows for answer in row.answers]
    parting = [answer.differs_at for answer in answers if answer.differs_at is not None]
    return Line(
        name,
        entry,
        rows[0].clients,
        rows[0].setting,
        len(rows),
        statistics.median(speeds),
        min(speeds),
        max(speeds),
        statistics.median(map(_decoding, rows)),
        statistics.median(statistics.median(answer.first_s for answer in row.answers) for row in rows),
        statistics.median(row.load_s for row in rows),
        statistics.median(row.peak_bytes for row in rows),
        len(answers) - len(parting),
        len(answers),
        statistics.median(parting) if parting else None,
    )


def _decoding(row: Measured) -> float:
    """Return tokens/s of an answer after those that came first, all of them together; of one client of several."""
    tokens = sum(answer.tokens - answer.at_first for answer in row.answers)
    seconds = sum(answer.seconds - answer.first_s for answer in row.answers)
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0
