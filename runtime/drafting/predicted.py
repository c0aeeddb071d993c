"""A text known beforehand as a draft source: an edited file, a rewritten paragraph, of which most comes back.

The answer is followed within the prediction as long as it says the same. Where it parts from it, words were put in,
left out or replaced, or it goes on somewhere else: the answer's last tokens are looked up in the prediction, and what
follows them there is proposed, the likeliest places as branches of one tree. How far a place is trusted depends on how
many tokens led to it, and on where it is; it begins at what is usual and is learned in each answer, so that a
prediction that is of no use soon costs nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from runtime.drafting.best_first import merge
from runtime.drafting.source import Context
from runtime.tree import Tree, candidate_path

# The last tokens of the answer that are compared with those before a place.
LONGEST = 16
# After so many tokens foretold one after the other there is no doubt where the answer is: no other place is looked for.
SURE = 8
# Places looked at, before and after where the answer is thought to be; and of those, the branches proposed.
BEFORE, AFTER = 16, 48
BRANCHES = 3
# Tokens that an answer may have put in where a place is thought to be, before it is looked for by what it says alone.
PUT_IN = 3
# Tokens that an answer may have in the place of others, for it to be expected after them.
MOST_REPLACED = 8
# How far from where it was an answer likely goes on.
BACK, AHEAD = 16, 64
# The beginnings of answer and prediction are worth so many tokens that are the same.
BEGINNING = 2
# The least tokens that are the same for the answer to be where they are, by `Where`.
FOUND = (2, 4, 8)


class Where(IntEnum):
    """A place, beside where the answer was last: there, or as far behind as it has had tokens since; near it; far."""

    EXPECTED = 0
    NEAR = 1
    FAR = 2


# A match of so many tokens or more has a trust of its own. The trust to begin with, by `Where`, is about the share of
# tokens after such a match that were right where 5 to 50 % of the words of files were changed.
STEPS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24)
PRIOR = (
    (0.12, 0.7, 0.83, 0.86, 0.88, 0.9, 0.91, 0.93, 0.95, 0.97),
    (0.05, 0.15, 0.35, 0.55, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95),
    (0.02, 0.06, 0.2, 0.45, 0.55, 0.7, 0.8, 0.85, 0.9, 0.93),
)
PRIOR_WEIGHT = 4.0


@dataclass(frozen=True)
class Guess:
    """What may follow: the tokens of the prediction from `place` on, after a match of `matched` tokens."""

    place: int
    where: Where
    matched: int


@dataclass
class Trust:
    """How often the token after a match was right, by `Where` and `STEPS`."""

    right: list[list[float]] = field(default_factory=lambda: [[one * PRIOR_WEIGHT for one in row] for row in PRIOR])
    tried: list[list[float]] = field(default_factory=lambda: [[PRIOR_WEIGHT] * len(row) for row in PRIOR])

    def of(self, where: Where, matched: int) -> float:
        """Return how probable it is that the token after a match of so many is right."""
        step = _step(matched)
        return self.right[where][step] / self.tried[where][step]

    def learn(self, where: Where, matched: int, right: bool) -> None:
        """Take note of whether it was."""
        step = _step(matched)
        self.tried[where][step] += 1
        self.right[where][step] += right


def _step(matched: int) -> int:
    step = len(STEPS) - 1
    while STEPS[step] > matched:
        step -= 1
    return step


def _ended(path: Tree, ends: Sequence[int], given: float) -> Tree:
    """Return a path without branches, and one of `ends` after it, which has the probability `given` for all of them."""
    last = len(path) - 1
    each = float(path.probabilities[last]) * given / max(1, len(ends))
    return Tree(
        np.append(path.tokens, np.array(ends, dtype=np.int64)),
        np.append(path.parents, np.full(len(ends), last)),
        np.append(path.depths, np.full(len(ends), last + 1)),
        np.append(path.probabilities, np.full(len(ends), each)),
    )


class Predicted:
    """The prediction `tokens` of an answer, after a prompt of `prompt_tokens`, which are told first. One of the tokens
    `ends` is expected after its last one.
    """

    name = "prediction"

    def __init__(self, tokens: Sequence[int], prompt_tokens: int = 0, ends: Sequence[int] = ()) -> None:
        self.tokens = list(tokens)
        self._ends = tuple(ends)
        self._to_skip = prompt_tokens
        self._answer: list[int] = []
        # The places after each token, in order.
        self._after: dict[int, list[int]] = defaultdict(list)
        for place, token in enumerate(self.tokens, start=1):
            self._after[token].append(place)
        self.trust = Trust()
        # Where the answer is, as far as is known; the tokens that led there one after the other, 0 where the last was
        # another; and the tokens since.
        self._place = self._run = self._since = 0
        self._guesses: list[Guess] = []
        self._found = bytearray(len(self.tokens))

    @property
    def found(self) -> int:
        """The tokens of the prediction that were found in the answer, each counted once."""
        return sum(self._found)

    def shortlist(self, max_rows: int) -> int:
        """See `DraftSource.shortlist`: pseudo rows are not read."""
        return 0

    def propose(self, context: Context) -> Tree:
        """See `DraftSource.propose`: what follows at the likeliest places."""
        self._guesses = self.guesses()
        most = context.max_rows - 1
        paths: list[Tree] = []
        # Of two that are as likely the one that is joined later has the more weight.
        for guess in reversed(self._guesses):
            tokens = self.tokens[guess.place : guess.place + most]
            given = [self.trust.of(guess.where, guess.matched + depth) for depth in range(len(tokens))]
            path = candidate_path(context.token, tokens, given)
            if len(tokens) < most:
                path = _ended(path, self._ends, self.trust.of(guess.where, guess.matched + len(tokens)))
            paths.append(path)
        return merge(context.token, paths, context.max_rows)

    def accept(self, tokens: Sequence[int]) -> None:
        """See `DraftSource.accept`."""
        if self._to_skip:
            skipped, tokens = min(self._to_skip, len(tokens)), tokens[self._to_skip :]
            self._to_skip -= skipped
        self._learn(tokens)
        for token in tokens:
            self._answer.append(token)
            self._follow(token)

    def guesses(self) -> list[Guess]:
        """Return where the answer may go on, the likeliest place first."""
        if not self.tokens or not self._answer:
            return []
        if self._run >= SURE:
            return [Guess(self._place, Where.EXPECTED, self._run)]
        found = self._looked_up()
        if not self._run and self._since <= PUT_IN:
            # As many words were replaced, or they were put in.
            places = (self._place + self._since, self._place)
            found += [Guess(place, Where.EXPECTED, 0) for place in places if place <= len(self.tokens)]
        found.sort(key=lambda one: (-self.trust.of(one.where, one.matched), -one.matched, self._distance(one.place)))
        best: dict[int, Guess] = {}
        for guess in found:
            best.setdefault(self._next(guess.place), guess)
            if len(best) == BRANCHES:
                break
        return list(best.values())

    def _next(self, place: int) -> int:
        return self.tokens[place] if place < len(self.tokens) else -1

    def _distance(self, place: int) -> int:
        return abs(place - self._place - self._since)

    def _learn(self, followed: Sequence[int]) -> None:
        """Take note of how the guesses fared, where the answer went on with `followed`."""
        for guess in self._guesses:
            for depth, token in enumerate(followed):
                if guess.place + depth >= len(self.tokens):
                    break
                right = self.tokens[guess.place + depth] == token
                self.trust.learn(guess.where, guess.matched + depth, right)
                if not right:
                    break
        self._guesses = []

    def _follow(self, token: int) -> None:
        """Take the answer's next token, which is its last already."""
        if self._next(self._place) == token:
            self._found[self._place] = True
            self._place += 1
            self._run += 1
            # One that is the same by chance does not tell where the answer is.
            self._since = 0 if self._run >= FOUND[Where.EXPECTED] else self._since
            if self._run >= SURE or not self._since:
                return
        else:
            self._since += 1
            self._run = 0
        found = max(self._looked_up(), key=self._rank, default=None)
        if found is not None and found.matched >= FOUND[found.where] and found.matched > self._run:
            self._place, self._run, self._since = found.place, found.matched, 0
            start = max(0, found.place - found.matched)
            self._found[start : found.place] = bytes([True]) * (found.place - start)

    def _rank(self, guess: Guess) -> tuple[float, int, int]:
        return self.trust.of(guess.where, guess.matched), guess.matched, -self._distance(guess.place)

    def _looked_up(self) -> list[Guess]:
        """Return the places after the answer's last token, with what matches before them."""
        places = self._after.get(self._answer[-1], [])
        if len(places) > BEFORE + AFTER:
            middle = bisect_left(places, self._place)
            places = places[max(0, middle - BEFORE) : middle + AFTER]
        return [Guess(place, self._where(place), self._matched(place)) for place in places]

    def _where(self, place: int) -> Where:
        start = self._place
        if start <= place <= start + min(self._since, MOST_REPLACED) + 1:
            return Where.EXPECTED
        return Where.NEAR if start - BACK <= place <= start + self._since + AHEAD else Where.FAR

    def _matched(self, place: int) -> int:
        """Return how many of the answer's last tokens are those before `place`."""
        answer, tokens = self._answer, self.tokens
        most = min(LONGEST, place, len(answer))
        matched = 0
        while matched < most and tokens[place - 1 - matched] == answer[-1 - matched]:
            matched += 1
        return matched + BEGINNING if matched == place == len(answer) else matched
