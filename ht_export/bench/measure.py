"""Measuring: all ways of answering a prompt, one after another in one process, several times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ht_export.bench.settings import PLAIN, Job
from ht_export.bench.ways import TIE, Answer, Way, first_difference


@dataclass(frozen=True)
class Difference:
    """Where a text first parts from that of plain decoding, and how near plain decoding was to it: see `Gap`.

    `gap` is None where the token was not possible. `wrong` says that it is an error: no tie, in arithmetic that gives
    the same text.
    """

    position: int
    gap: float | None
    wrong: bool


@dataclass(frozen=True)
class Runs:
    """One way of answering one prompt: lists have an entry for each repeat, and `accepted` adds all of them up.

    `identical` says whether the text is that of plain decoding, None where it need not be.
    """

    new_tokens: list[int]
    steps: list[int]
    tokens_per_second: list[float]
    decode_tokens_per_second: list[float]
    time_to_first_token_s: list[float]
    accepted: list[int]
    identical: bool | None
    difference: Difference | None


@dataclass(frozen=True)
class Row:
    """The measurements of one prompt with one seed."""

    id: str
    task: str
    seed: int | None
    prompt_tokens: int
    ways: dict[str, Runs]

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Row:
        """Return the row of which `asdict` gave `value`. Raises `KeyError` or `TypeError` if there is none."""
        ways = {}
        for name, runs in value["ways"].items():
            difference = runs["difference"]
            ways[name] = Runs(**{**runs, "difference": difference and Difference(**difference)})
        return cls(**{**value, "ways": ways})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return asdict(self)


def measure(
    ways: Sequence[Way], job: Job, prompt_tokens: int, repeats: int, turn: int, tick: Callable[[], None]
) -> Row:
    """Answer a prompt in all `ways`, `repeats` times over, and call `tick` after each answer.

    The order moves on by one with each repeat and each `turn`, so that a machine that grows slower, or warmer, or
    busier, does so for all ways alike.
    """
    answers: dict[str, list[Answer]] = {way.name: [] for way in ways}
    for repeat in range(repeats):
        first = (turn + repeat) % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            answers[way.name].append(way.answer(job))
            tick()
    plain = answers[PLAIN][0].tokens
    return Row(
        job.id,
        job.task,
        job.sampling.seed,
        prompt_tokens,
        {way.name: _runs(way, job, answers[way.name], plain) for way in ways},
    )


def _runs(way: Way, job: Job, answers: Sequence[Answer], plain: Sequence[int]) -> Runs:
    accepted: Counter[int] = Counter()
    for answer in answers:
        accepted.update(dict(enumerate(answer.accepted)))
    difference = None
    if way.gap is not None:
        found = (_difference(way, job, answer.tokens, plain) for answer in answers)
        # The worst of the repeats: one that is wrong, if there is one.
        difference = max(filter(None, found), key=lambda one: one.wrong, default=None)
    return Runs(
        new_tokens=[len(answer.tokens) for answer in answers],
        steps=[answer.steps for answer in answers],
        tokens_per_second=[len(answer.tokens) / answer.seconds for answer in answers],
        decode_tokens_per_second=[answer.decode_tokens_per_second for answer in answers],
        time_to_first_token_s=[answer.time_to_first_token_s for answer in answers],
        accepted=[accepted[count] for count in range(max(accepted, default=-1) + 1)],
        identical=None if way.gap is None else difference is None,
        difference=difference,
    )


def _difference(way: Way, job: Job, own: Sequence[int], plain: Sequence[int]) -> Difference | None:
    position = first_difference(plain, own)
    if position is None:
        return None
    assert way.gap is not None
    gap = way.gap(job, plain, own, position)
    return Difference(position, gap if gap < float("inf") else None, way.required and not gap < TIE)
