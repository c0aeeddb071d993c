"""Measuring: all ways of answering a prompt, one after another in one process, several times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from msgspec import Meta

from ht_export.bench.settings import PLAIN, SPECULATIVE, Job
from ht_export.bench.ways import TIE, Answer, Way, first_difference

Count = Annotated[int, Meta(ge=0, le=1 << 60)]
# Below any infinite one.
Number = Annotated[float, Meta(ge=0, le=1e300)]


@dataclass(frozen=True)
class Difference:
    """Where a text first parts from that of plain decoding, and how near plain decoding was to it: see `Gap`.

    `gap` is None where the token was not possible. `wrong` says that it is an error: no tie, in arithmetic that gives
    the same text.
    """

    position: Count
    gap: Annotated[float, Meta(ge=-1e300, le=1e300)] | None
    wrong: bool


@dataclass(frozen=True)
class Runs:
    """One way of answering one prompt: lists have an entry for each repeat, and `accepted` adds all of them up.

    `identical` says whether the text is that of plain decoding, None where it need not be.
    """

    new_tokens: Annotated[list[Count], Meta(min_length=1)]
    steps: list[Annotated[int, Meta(ge=1, le=1 << 60)]]
    tokens_per_second: list[Annotated[float, Meta(gt=0, le=1e300)]]
    decode_tokens_per_second: list[Number]
    time_to_first_token_s: list[Number]
    accepted: list[Count]
    identical: bool | None
    difference: Difference | None

    def __post_init__(self) -> None:
        by_repeat = (self.steps, self.tokens_per_second, self.decode_tokens_per_second, self.time_to_first_token_s)
        if any(len(numbers) != self.repeats for numbers in by_repeat):
            raise ValueError("its lists have not one number for each repeat")

    @property
    def repeats(self) -> int:
        """How often the prompt was answered."""
        return len(self.new_tokens)


@dataclass(frozen=True)
class Row:
    """The measurements of one prompt with one seed."""

    id: str
    task: str
    seed: int | None
    prompt_tokens: Count
    ways: Annotated[dict[str, Runs], Meta(min_length=1)]

    @property
    def layout(self) -> tuple[list[str], int]:
        """The names of the ways, and how often the prompt was answered in each: the same in all rows of a run.

        Raises `ValueError` when ways were repeated more often than others, or one that all runs have is missing.
        """
        counts = {runs.repeats for runs in self.ways.values()}
        if len(counts) > 1 or not {PLAIN, SPECULATIVE} <= self.ways.keys():
            raise ValueError(f"row {self.id!r:.60} lacks {PLAIN} or {SPECULATIVE} decoding, or some of their repeats")
        return sorted(self.ways), counts.pop()

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
