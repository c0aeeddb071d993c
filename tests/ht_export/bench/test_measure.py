import json
import math

import msgspec
import pytest

from ht_export.bench.measure import Row, measure
from ht_export.bench.settings import Job
from ht_export.bench.ways import Answer, Way, first_difference
from runtime import Sampling

JOB = Job("7", "a", "Hello", Sampling())


def way(name: str, answers: list[Answer], log: list[str], gap: float | None = 1.0, required: bool = True) -> Way:
    """Return a way that gives these answers in turn, and the last one forever, and logs its name for each."""
    left = list(answers)

    def answer(job: Job) -> Answer:
        log.append(name)
        return left.pop(0) if len(left) > 1 else left[0]

    return Way(name, answer, None if gap is None else (lambda *_: gap), required)


def answer(tokens: list[int], seconds: float = 0.5, steps: int = 1, accepted: tuple[int, ...] = ()) -> Answer:
    return Answer(tokens, seconds, 2 * len(tokens) / seconds, 0.1, steps, accepted)


def test_ways_take_turns_and_the_order_moves_on_with_each_repeat_and_prompt() -> None:
    log: list[str] = []
    ways = [way(name, [answer([1])], log) for name in ("plain", "speculative", "other")]
    ticks: list[None] = []
    measure(ways, JOB, 5, repeats=3, turn=1, tick=lambda: ticks.append(None))
    orders = [log[start : start + 3] for start in range(0, 9, 3)]
    assert orders == [
        ["speculative", "other", "plain"],
        ["other", "plain", "speculative"],
        ["plain", "speculative", "other"],
    ]
    assert len(ticks) == 9


def test_a_row_has_what_each_repeat_gave() -> None:
    log: list[str] = []
    fast = [answer([1, 2, 3], 0.5, 2, (0, 1)), answer([1, 2, 3], 0.25, 3, (2,))]
    row = measure([way("plain", [answer([1, 2, 3])], log), way("speculative", fast, log)], JOB, 5, 2, 0, lambda: None)
    runs = row.ways["speculative"]
    assert (row.id, row.task, row.seed, row.prompt_tokens) == ("7", "a", None, 5)
    assert runs.new_tokens == [3, 3]
    assert runs.tokens_per_second == [6.0, 12.0]
    assert runs.decode_tokens_per_second == [12.0, 24.0]
    assert runs.steps == [2, 3]
    assert runs.accepted == [2, 1]
    assert runs.identical
    assert msgspec.convert(json.loads(json.dumps(row.to_dict())), Row) == row


@pytest.mark.parametrize(
    ("gap", "required", "wrong"), [(0.5, True, True), (1e-5, True, False), (0.5, False, False), (math.inf, True, True)]
)
def test_another_text_is_wrong_where_it_must_be_the_same_unless_at_a_tie(
    gap: float, required: bool, wrong: bool
) -> None:
    log: list[str] = []
    other = way("speculative", [answer([1, 2, 4, 4])], log, gap, required)
    runs = measure([way("plain", [answer([1, 2, 3, 4])], log), other], JOB, 5, 1, 0, lambda: None).ways["speculative"]
    assert runs.identical is False
    assert runs.difference is not None
    assert runs.difference.position == 2
    assert runs.difference.gap == (None if gap == math.inf else gap)
    assert runs.difference.wrong is wrong


def test_every_repeat_is_checked() -> None:
    log: list[str] = []
    same = [answer([1, 2])] * 2
    late = way("speculative", [*same, answer([1, 3])], log)
    row = measure([way("plain", [answer([1, 2])], log), late], JOB, 5, 3, 0, lambda: None)
    assert row.ways["speculative"].difference is not None
    unsteady = way("plain", [*same, answer([5, 2])], log)
    row = measure([unsteady, way("speculative", same, log)], JOB, 5, 3, 0, lambda: None)
    assert row.ways["plain"].difference is not None
    assert row.ways["speculative"].identical


def test_a_text_that_need_not_be_the_same_is_not_compared() -> None:
    log: list[str] = []
    sampled = way("transformers", [answer([9])], log, gap=None)
    runs = measure([way("plain", [answer([1])], log), sampled], JOB, 5, 1, 0, lambda: None).ways["transformers"]
    assert runs.identical is None
    assert runs.difference is None


@pytest.mark.parametrize(
    ("one", "other", "position"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([1], [1, 2], 1)]
)
def test_where_two_answers_differ(one: list[int], other: list[int], position: int | None) -> None:
    assert first_difference(one, other) == position
