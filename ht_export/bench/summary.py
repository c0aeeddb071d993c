"""From measured rows to the figures of design section 8: overall, and for each task."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, zip_longest
from typing import Any

from ht_export.bench.measure import Row, Runs
from ht_export.bench.settings import OF_TRANSFORMERS, PLAIN, SPECULATIVE, TRANSFORMERS, WITHOUT_NGRAMS


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return `overall`, `tasks` by name, and `checks` of the texts by way. Without rows all are empty."""
    tasks = sorted({row.task for row in rows})
    return {
        "overall": group_summary(rows) if rows else {},
        "tasks": {task: group_summary([row for row in rows if row.task == task]) for task in tasks},
        "checks": checks(rows),
    }


def group_summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the figures of some rows, at least one; `ways` has those of each way.

    A row's figure is the median over its repeats. A speed is the mean over rows, and a speed-up the ratio of two such
    means: prompt processing included, or, `decode_speedup`, without the prompt and the first token. `speedup_range`
    has the least and the largest speed-up over all rows of one repeat, `slowest` is the row with the least of its own,
    and `ratios` tell how many times as fast as each other way speculative decoding is.
    """
    ways = {name: _way_summary(rows, name) for name in rows[0].ways}
    fast, plain = ways[SPECULATIVE], ways[PLAIN]
    reference = ways.get(TRANSFORMERS, {}).get("tokens_per_second")
    return {
        "prompts": sum(row.seed == rows[0].seed for row in rows),
        "answers": len(rows),
        "speedup": fast["speedup"],
        "speedup_range": fast["speedup_range"],
        "decode_speedup": fast["decode_speedup"],
        "tokens_per_step": fast["tokens_per_step"],
        "tokens_per_step_without_ngrams": ways.get(WITHOUT_NGRAMS, {}).get("tokens_per_step"),
        "acceptance": fast["acceptance"],
        "tokens_per_second": fast["tokens_per_second"],
        "plain_tokens_per_second": plain["tokens_per_second"],
        "transformers_tokens_per_second": reference,
        "plain_over_transformers": reference and plain["tokens_per_second"] / reference,
        "time_to_first_token_s": fast["time_to_first_token_s"],
        "plain_time_to_first_token_s": plain["time_to_first_token_s"],
        "slowest": slowest(rows),
        "ratios": ratios(ways),
        "ways": ways,
    }


def ratios(ways: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return for each way that is compared, by its name, `speed`: our tokens/s over its own, and `speedup`: our
    speed-up over plain decoding over its own. These differ for ways of transformers alone, whose plain decoding is
    another.
    """
    ours = ways[SPECULATIVE]["tokens_per_second"]
    our_speedup = ours / ways[PLAIN]["tokens_per_second"]
    found = {}
    for name, way in ways.items():
        if name in (SPECULATIVE, WITHOUT_NGRAMS):
            continue
        # A file may have been measured without them.
        plain = ways.get(TRANSFORMERS if name in OF_TRANSFORMERS else PLAIN, ways[PLAIN])
        speedup = our_speedup / (way["tokens_per_second"] / plain["tokens_per_second"])
        found[name] = {"speed": ours / way["tokens_per_second"], "speedup": speedup}
    return found


def acceptance(accepted: Sequence[int]) -> list[float]:
    """Return by depth, from 1, how often a step accepted so many tokens, given that it accepted those before.

    Steps that did not draft so deep count too. accepted[n] counts steps that accepted n: with [50, 30, 20] depth 1 is
    accepted in half of them, and depth 2 in 20 of those 50.
    """
    reached = [sum(accepted[depth:]) for depth in range(len(accepted))]
    return [after / before for before, after in pairwise(reached) if before]


def slowest(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the row with the least speed-up."""

    def speedup(row: Row) -> float:
        fast, plain = (statistics.median(row.ways[name].tokens_per_second) for name in (SPECULATIVE, PLAIN))
        return fast / plain

    row = min(rows, key=speedup)
    return {"id": row.id, "task": row.task, "seed": row.seed, "speedup": speedup(row)}


def checks(rows: Sequence[Row]) -> dict[str, Any]:
    """Return of each way whose text is compared with that of plain decoding how many are identical, and where others
    part from it; `wrong` counts those that do where no rounding excuses it.
    """
    found = {}
    for name in rows[0].ways if rows else ():
        compared = [row for row in rows if row.ways[name].identical is not None]
        if not compared:
            continue
        differing = [
            {"id": row.id, "task": row.task, "seed": row.seed, **vars(difference)}
            for row in compared
            if (difference := row.ways[name].difference)
        ]
        found[name] = {
            "answers": len(compared),
            "identical": len(compared) - len(differing),
            "wrong": sum(difference["wrong"] for difference in differing),
            "differences": differing,
        }
    return found


def _way_summary(rows: Sequence[Row], name: str) -> dict[str, Any]:
    runs = [row.ways[name] for row in rows]
    plain = [row.ways[PLAIN] for row in rows]
    speed, plain_speed = (_mean(some, lambda run: run.tokens_per_second) for some in (runs, plain))
    decode, plain_decode = _decode_speeds(runs, plain)
    accepted = [sum(counts) for counts in zip_longest(*(run.accepted for run in runs), fillvalue=0)]
    return {
        "speedup": speed / plain_speed,
        "speedup_range": _speedup_range(runs, plain),
        "decode_speedup": decode / plain_decode if decode and plain_decode else None,
        "tokens_per_step": _total(run.new_tokens for run in runs) / _total(run.steps for run in runs),
        "tokens_per_second": speed,
        "decode_tokens_per_second": decode,
        "time_to_first_token_s": _mean(runs, lambda run: run.time_to_first_token_s),
        "accepted": accepted,
        "acceptance": acceptance(accepted),
    }


def _decode_speeds(runs: Sequence[Runs], plain: Sequence[Runs]) -> tuple[float, float] | tuple[None, None]:
    """Return the means over answers of more than one step: of one there is no decoding after the first."""
    long = [
        pair for pair in zip(runs, plain, strict=True) if all(min(run.decode_tokens_per_second) > 0 for run in pair)
    ]
    if not long:
        return None, None
    speed, plain_speed = (_mean(side, lambda run: run.decode_tokens_per_second) for side in zip(*long, strict=True))
    return speed, plain_speed


def _speedup_range(runs: Sequence[Runs], plain: Sequence[Runs]) -> list[float]:
    ratios = []
    for repeat in range(len(plain[0].tokens_per_second)):
        speed, plain_speed = (statistics.fmean(run.tokens_per_second[repeat] for run in some) for some in (runs, plain))
        ratios.append(speed / plain_speed)
    return [min(ratios), max(ratios)]


def _mean(runs: Iterable[Runs], figure: Callable[[Runs], Sequence[float]]) -> float:
    return statistics.fmean(statistics.median(figure(run)) for run in runs)


def _total(numbers: Iterable[Sequence[int]]) -> int:
    return sum(map(sum, numbers))
