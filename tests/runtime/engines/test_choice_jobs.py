"""A choice made of a kernel's answer is the choice that the host makes of the whole row, or none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from plugins import choose_reference as reference
from plugins.choosing import BEST, HEADER, MOST_BEST, RACE, SCORE_MARGIN, SUM_MARGIN, TOP, answer_words, tile
from runtime.drafting.drafts import most_probable
from runtime.engines.choice_jobs import Answer, Jobs, Question
from runtime.rows import Rows, lay_out
from runtime.sampling.choice import ArgMax, Race, Wanted, WholeLogits
from runtime.sampling.noise import Noise
from runtime.tree import chain

POSITION = 5


def rows_of(wanted: Wanted, shortlist: int = 0, position: int = POSITION) -> Rows:
    """Return rows of one token before `position`, and a pseudo row."""
    parents = (np.zeros(1, dtype=np.int64),)
    return lay_out(chain([1]), parents, (0,), position - 1, np.zeros(1, np.int64), wanted=wanted, shortlist=shortlist)


def answered(logits: NDArray[np.float32], wanted: Wanted, rng: np.random.Generator) -> Answer | None:
    """Return the answer for a row whose kernels are as inexact as they may be; None where the row has to be had whole.

    Tokens with a score that may be above the bound come, those with one that may be below it don't, by chance.
    """
    jobs = Jobs()
    answers = jobs.choose(rows_of(wanted), np.array([256]))
    if answers is None:
        return None
    ((job,),) = jobs.tables
    tiling = tile(len(logits))
    tempered = reference.tempered(logits, job["temperature"])
    tops, groups = reference.peaks(tempered, tiling)
    top = reference.as_floats(tops.max(keepdims=True))[0]
    found = reference.collect(tempered, tops, groups, reference.weigh(tempered, top, job, tiling), job)
    tokens, total = found.tokens, float(found.total)
    if job["kind"] == RACE and np.isfinite(top):
        scores = reference.scores(tempered, top, int(job["key"]), job["least"])
        first, second = (scores + rng.uniform(-SCORE_MARGIN, SCORE_MARGIN, len(scores)) for _ in range(2))
        total = float(first.max())
        tokens = np.flatnonzero(second >= total - 2 * SCORE_MARGIN)
    elif job["kind"] == BEST:
        total *= 1 + rng.uniform(-SUM_MARGIN, SUM_MARGIN)
    results = np.full(answer_words(int(job["room"])), 0x55555555, dtype=np.int32)
    room = int(job["room"])
    results[0] = len(tokens)
    results[1:3] = np.array([top, total], dtype=np.float32).view(np.int32)
    held = rng.permutation(tokens)[:room]
    results[HEADER : HEADER + len(held)] = held
    results[HEADER + room : HEADER + room + len(held)] = tempered[held].view(np.int32)
    return answers.of(0, results)


def neck_and_neck(rng: np.random.Generator, race: Race, vocab: int) -> NDArray[np.float32]:
    """Return logits with which many tokens finish together, within a few times the margin or by far less."""
    waits = race.noise.waits(POSITION, np.arange(vocab))
    scale = rng.choice([1e-7, 1e-5, 3 * SCORE_MARGIN, 1e-2])
    together = np.log(waits) + rng.uniform(-scale, scale, vocab)
    apart = rng.random(vocab) < rng.choice([0.0, 0.9, 0.99])
    return ((together - 8 * apart) * race.temperature).astype(np.float32)


@settings(deadline=None, max_examples=400)
@given(
    st.integers(2, 1500),
    st.sampled_from([0.05, 0.7, 1.0, 1.8]),
    st.none() | st.integers(1, 300),
    st.none() | st.floats(0.01, 1.0),
    st.none() | st.floats(0.0, 1.0),
    st.booleans(),
    st.integers(0, 2**40),
)
def test_a_sampled_choice_is_the_hosts_or_is_not_made(
    vocab: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, near: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    race = Race(Noise(seed, 3), vocab, temperature, top_k, top_p, min_p)
    if near:
        logits = neck_and_neck(rng, race, vocab)
    else:
        logits = (rng.standard_normal(vocab) * rng.choice([0.1, 2.0, 10.0])).astype(np.float32)
        if rng.random() < 0.3:
            logits = np.round(logits)
    answer = answered(logits, race, rng)
    assume(answer is not None)
    assert answer is not None
    found = answer.chosen(race, POSITION)
    if found is not None:
        assert found == race.choose(logits, POSITION)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, 1.0),
        ({"min_p": 0.05}, 1.0),
        ({"top_k": 50}, 1.0),
        ({"top_k": 20, "top_p": 0.8}, 1.0),
        ({"top_p": 0.9}, 0.6),
        ({"top_k": 300}, 0.0),
    ],
)
def test_how_many_choices_need_no_whole_row(options: dict[str, float], least: float) -> None:
    rng = np.random.default_rng(0)
    vocab, made, rows = 32000, 0, 60
    for seed in range(rows):
        # About as many tokens are probable as in text: a few at some places, hundreds at others.
        logits = (rng.standard_normal(vocab) * rng.uniform(2.5, 5)).astype(np.float32)
        race = Race(Noise(seed, 3), vocab, 0.8, **options)  # type: ignore[arg-type]
        answer = answered(logits, race, rng)
        found = answer and answer.chosen(race, POSITION)
        if found is not None:
            made += 1
            assert found == race.choose(logits, POSITION)
    assert made >= least * rows
    assert made > 0 or not least


def test_two_tokens_that_finish_together_are_told_apart_by_the_host() -> None:
    race = Race(Noise(1, 3), 400, 1.0)
    logits = np.log(race.noise.waits(POSITION, np.arange(400))).astype(np.float32)
    logits[7:] -= 1
    rng = np.random.default_rng(0)
    for _ in range(20):
        answer = answered(logits, race, rng)
        assert answer is not None
        assert answer.count > 1
        assert answer.chosen(race, POSITION) == race.choose(logits, POSITION)


def test_where_more_tokens_finish_together_than_there_is_room_for_none_is_chosen() -> None:
    race = Race(Noise(1, 3), 400, 1.0)
    logits = np.log(race.noise.waits(POSITION, np.arange(400))).astype(np.float32)
    answer = answered(logits, race, np.random.default_rng(0))
    assert answer is not None
    assert answer.count > len(answer.tokens)
    assert answer.chosen(race, POSITION) is None


def test_a_token_whose_number_is_1_needs_the_whole_row() -> None:
    race = Race(Noise(1, 3), 400, 1.0)
    tokens, logits = np.array([3], dtype=np.int32), np.zeros(1, dtype=np.float32)
    assert Answer(1, tokens, logits, 0.0, math.inf).chosen(race, POSITION) is None


def test_a_winner_that_others_may_have_beaten_is_none() -> None:
    race = Race(Noise(1, 3), 400, 1.0)
    tokens, logits = np.array([3], dtype=np.int32), np.zeros(1, dtype=np.float32)
    score = -math.log(race.noise.waits(POSITION, np.array([3]))[0])
    assert Answer(1, tokens, logits, 0.0, score).chosen(race, POSITION) is not None
    assert Answer(1, tokens, logits, 0.0, score + 2 * SCORE_MARGIN).chosen(race, POSITION) is None


@settings(deadline=None)
@given(st.integers(1, 400), st.booleans(), st.integers(0, 2**31))
def test_an_arg_max_is_the_smallest_of_equals(vocab: int, rounded: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(vocab).astype(np.float32)
    if rounded:
        logits = np.round(logits)
    answer = answered(logits, ArgMax(), rng)
    assert answer is not None
    found = answer.chosen(ArgMax(), POSITION)
    assert found is None if answer.count > len(answer.tokens) else found == ArgMax().choose(logits, POSITION)
    assert rounded or found is not None


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("wanted", [ArgMax(), Race(Noise(0, 3), 50, 0.5), Race(Noise(0, 3), 50, 0.5, 9, 0.9)])
def test_logits_that_are_no_numbers_are_told(odd: float, wanted: ArgMax | Race) -> None:
    logits = np.zeros(50, dtype=np.float32)
    logits[7] = odd
    answer = answered(logits, wanted, np.random.default_rng(0))
    assert answer is not None
    found = answer.chosen(wanted, POSITION)
    assert found is not None
    np.testing.assert_array_equal(found.top, wanted.choose(logits, POSITION).top)


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 80), st.booleans(), st.integers(0, 2**31))
def test_a_shortlist_has_the_hosts_tokens_in_the_hosts_order(vocab: int, count: int, rounded: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(vocab) * 3).astype(np.float32)
    if rounded:
        logits = np.round(logits, 1)
    # The question of a race with top-k is that of a shortlist.
    assert Question.of(Race(Noise(0, 0), vocab + 100, 1.0, count)) == Question.shortlist(count)
    answer = answered(logits, Race(Noise(0, 0), vocab + 100, 1.0, count), rng)
    assert answer is not None
    found = answer.draft(count)
    if found is None:
        assert answer.count > len(answer.tokens)
        return
    expected = most_probable(logits, count)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=2 * SUM_MARGIN)


def test_what_has_to_be_had_whole_has_no_job() -> None:
    jobs = Jobs()
    for wanted in (WholeLogits(), Race(Noise(0, 0), 1000, 1.0, MOST_BEST + 1)):
        assert jobs.choose(rows_of(wanted), np.array([256])) is None
    assert jobs.shortlist(rows_of(ArgMax(), shortlist=MOST_BEST + 1), np.array([256])) is None
    assert jobs.shortlist(rows_of(ArgMax()), np.array([256])) is None
    assert (jobs.count, jobs.words) == (0, 0)


def test_options_that_keep_all_tokens_ask_no_more_than_a_race() -> None:
    question = Question.of(Race(Noise(0, 0), 1000, 0.5, 1000, 1.0, 0.0))
    assert question is not None
    assert (question.kind, question.temperature, question.least) == (RACE, 0.5, -math.inf)
    greedy = Question.of(ArgMax())
    assert greedy is not None
    assert greedy.kind == TOP


def test_a_row_within_a_prompt_is_asked_about_though_nothing_is_drawn_there() -> None:
    jobs = Jobs()
    assert jobs.choose(rows_of(Race(Noise(0, 9), 1000, 1.0), position=5), np.array([256])) is not None
