"""Jobs for the kernels of choices, from what requests want of their rows; and their answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plugins.choosing import (
    BEST,
    HEADER,
    JOB,
    MOST_BEST,
    RACE,
    RACE_ROOM,
    SCORE_MARGIN,
    SUM_MARGIN,
    TOP,
    TOP_ROOM,
    answer_words,
    best_room,
)
from runtime.arrays import Float32Array, IntArray
from runtime.drafting.drafts import DraftStep, ranked
from runtime.rows import Rows
from runtime.sampling.choice import ArgMax, Chosen, Race, Wanted, WholeLogits
from runtime.sampling.parts import Part, drawn_from, first_of, most_probable_of

# How far below that of min-p the logarithm of a weight may seem to be that min-p keeps. The weights of a smaller min-p
# lack bits, and no token with less can win.
MIN_P_MARGIN = 1e-4
SMALLEST_MIN_P = 1e-30


@dataclass(frozen=True)
class Question:
    """What is asked of all rows of a request: see `plugins.choosing`."""

    kind: int
    room: int
    count: int = 0
    temperature: float = 1.0
    least: float = -math.inf

    @classmethod
    def of(cls, wanted: Wanted) -> Question | None:
        """Return what to ask of rows of which this is `wanted`, None where whole rows have to be had."""
        match wanted:
            case ArgMax():
                return cls(TOP, TOP_ROOM)
            case WholeLogits():
                return None
        if wanted.top_k is None and wanted.top_p is None:
            min_p = wanted.min_p or 0.0
            least = math.log(min_p) - MIN_P_MARGIN if min_p > SMALLEST_MIN_P else -math.inf
            return cls(RACE, RACE_ROOM, temperature=wanted.temperature, least=least)
        count = MOST_BEST if wanted.top_k is None else wanted.top_k
        return cls(BEST, best_room(count), count, wanted.temperature) if count <= MOST_BEST else None

    @classmethod
    def shortlist(cls, count: int) -> Question | None:
        """Return what to ask of rows whose `count` most probable tokens are wanted, None where whole rows have to be
        had.
        """
        return cls(BEST, best_room(count), count) if 0 < count <= MOST_BEST else None


@dataclass(frozen=True)
class Answer:
    """The answer for one row: how many tokens there are, of which the first ones, in an order of no meaning, are in
    `tokens` [N] with their tempered `logits` [N]; the `top` of the row, and the number behind it in the header.
    """

    count: int
    tokens: NDArray[np.int32]
    logits: Float32Array
    top: float
    total: float

    def part(self) -> Part | None:
        """Return what there is of the row, None where that is not all that was asked for."""
        if self.count > len(self.tokens):
            return None
        order = np.argsort(self.tokens)
        return Part(self.tokens[order].astype(np.int64), self.logits[order], self.top)

    def chosen(self, wanted: ArgMax | Race, position: int) -> Chosen | None:
        """Return what is wanted of the row, None where this does not suffice."""
        if not math.isfinite(self.top):
            return Chosen(-1, self.top)
        part = self.part()
        if part is None:
            return None
        if isinstance(wanted, ArgMax):
            return most_probable_of(part)
        if wanted.top_k is None and wanted.top_p is None:
            return first_of(wanted, part, position, self.total - SCORE_MARGIN)
        return drawn_from(wanted, part, position, self.total, SUM_MARGIN)

    def draft(self, count: int) -> DraftStep | None:
        """Return the `count` most probable tokens, None where this does not suffice."""
        part = self.part()
        return None if part is None else ranked(part.tokens, part.logits, count, self.total)


@dataclass(frozen=True)
class Answers:
    """Where in the results the answers for rows of a request are: one behind the other, with equal room."""

    start: int
    room: int

    def of(self, index: int, results: NDArray[np.int32]) -> Answer:
        """Return the answer for row `index`."""
        start = self.start + index * answer_words(self.room)
        count, *floats = results[start : start + HEADER]
        held = min(int(count), self.room)
        start += HEADER
        logits = results[start + self.room : start + self.room + held].view(np.float32)
        top, total, _ = np.array(floats).view(np.float32).tolist()
        return Answer(int(count), results[start : start + held], logits, top, total)


class Jobs:
    """The jobs of one pass: their `tables`, how many there are, and the words of their answers."""

    def __init__(self) -> None:
        self.tables: list[NDArray[np.void]] = []
        self.count = 0
        self.words = 0

    def choose(self, rows: Rows, addresses: IntArray) -> Answers | None:
        """Add what is wanted of a request's logit rows [M], which are at these addresses [M]. Return where the answers
        will be, None where whole rows have to be had.
        """
        question = Question.of(rows.wanted)
        if question is None:
            return None
        noise = rows.wanted.noise if isinstance(rows.wanted, Race) else None
        keys = None
        if noise is not None:
            positions = rows.position_ids[rows.logit_rows] + 1
            # Within a prompt nothing is drawn.
            keys = np.array([noise.key(p) if p >= noise.start else 0 for p in positions.tolist()], dtype=np.uint64)
        return self._add(question, addresses, keys)

    def shortlist(self, rows: Rows, addresses: IntArray) -> Answers | None:
        """Add what is wanted of a request's pseudo rows [sum R_k]; see `choose`."""
        question = Question.shortlist(rows.shortlist)
        return None if question is None else self._add(question, addresses)

    def _add(self, question: Question, addresses: IntArray, keys: NDArray[np.uint64] | None = None) -> Answers:
        table = np.zeros(len(addresses), dtype=JOB)
        answers = Answers(self.words, question.room)
        words = answer_words(question.room)
        table["row"] = addresses
        table["kind"] = question.kind
        table["count"] = question.count
        table["room"] = question.room
        table["out"] = self.words + words * np.arange(len(addresses))
        table["temperature"] = question.temperature
        table["least"] = question.least
        if keys is not None:
            table["key"] = keys
        self.tables.append(table)
        self.count += len(addresses)
        self.words += words * len(addresses)
        return answers
