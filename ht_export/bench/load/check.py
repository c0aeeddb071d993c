"""Return whether every text under load is the text of its request alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ht_export.bench.load.measure import Run
from ht_export.bench.settings import Job
from ht_export.bench.ways import TIE, first_difference, plain_gap
from runtime.generator import Generator


def check_texts(
    generator: Generator,
    jobs: Sequence[Job],
    alone: Sequence[Sequence[int]],
    runs: Sequence[tuple[str, str, Run]],
) -> dict[str, Any]:
    """Return how many texts are the same as the tokens of plain decoding `alone`, and each place where one parts from
    them: at a tie, or wrong. In other precisions than float32 rounding may decide, and no text is wrong.
    """
    exact = generator.about.precision == "float32"
    same = 0
    parted: dict[str, list[dict[str, Any]]] = {"ties": [], "wrong": []}
    gaps: dict[tuple[int, int, int], float] = {}
    for arrivals, way, run in runs:
        for answer in run.answers:
            own = alone[answer.job]
            position = first_difference(own, answer.tokens)
            if position is None:
                same += 1
                continue
            token = answer.tokens[position] if position < len(answer.tokens) else -1
            key = (answer.job, position, token)
            if key not in gaps:
                gaps[key] = plain_gap(generator, jobs[answer.job], answer.tokens, position)
            place = {
                "prompt": jobs[answer.job].id,
                "arrivals": arrivals,
                "way": way,
                "position": position,
                "gap": gaps[key],
            }
            parted["wrong" if exact and gaps[key] > TIE else "ties"].append(place)
    texts = sum(len(run.answers) for _, _, run in runs)
    return {"texts": texts, "same": same, **parted}
