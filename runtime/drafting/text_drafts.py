"""Text as a draft source: what followed when the text's last tokens were there before, in the prompt, in the answer, or
in a prediction of it.

Text that quotes, edits or repeats itself, or a text known beforehand, can be drafted so without any pass, at every
depth. All earlier places of the last token are looked up, up to a bound; each goes on for as long as the text says the
same, and is trusted the more the more tokens it had in common (`continuations.py`). Where places differ, what follows
them are branches. Where the answer parts from what it was copying, words were put in, left
out or replaced: places near to where it was are trusted more than others. How far a place is trusted begins at what is
usual and is learned in each answer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from runtime.drafting.continuations import STEPS, Level, Trust, grow
from runtime.drafting.source import Context
from runtime.tree import Tree, root_alone

# Places looked at, the latest; and around where the answer is thought to be.
LATEST, BEFORE, AFTER = 8, 4, 8
# Tokens that an answer may have put in where it is thought to be, before it is looked for by what it says alone; and
# that it may have in the place of others, for it to be expected after them.
PUT_IN, MOST_REPLACED = 3, 8
# How far from where it was an answer likely goes on.
BACK, AHEAD = 16, 64
# The beginnings of answer and prediction are worth so many tokens that are the same.
BEGINNING = 2
# The least tokens that are the same for the answer to be where they are, by `Where`.
FOUND = (2, 4, 8)
# Stands for the end of a prediction; and where the answer is before anything tells.
END = -1
NOWHERE = -(1 << 40)


class Where(IntEnum):
    """A place, beside where the answer was last: there, or as far behind as it has had tokens since; near it; far."""

    EXPECTED = 0
    NEAR = 1
    FAR = 2


# The trust to begin with, by `Where` and `STEPS`, is about the share of tokens after such a match that were right in
# development texts, and where words of files were changed.
PRIOR = (
    (0.12, 0.35, 0.68, 0.72, 0.8, 0.8, 0.88, 0.92, 0.95, 0.98),
    (0.02, 0.27, 0.5, 0.6, 0.7, 0.75, 0.83, 0.89, 0.94, 0.98),
    (0.02, 0.2, 0.42, 0.55, 0.67, 0.75, 0.8, 0.89, 0.94, 0.98),
)
# That of expected places where there is a prediction.
PREDICTED_PRIOR = (0.3, 0.65, 0.82, 0.83, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98)


class Match(NamedTuple):
    """A place in the text: the tokens from it on may follow, as `matched` tokens before it are the text's last."""

    place: int
    matched: int
    where: Where


class TextDrafts:
    """What may follow a text by what it has said, and by the `prediction` of its answer, after which one of the tokens
    `ends` is expected. With `itself` False nothing but the prediction is looked at.
    """

    name = "text"

    def __init__(self, prediction: Sequence[int] = (), ends: Sequence[int] = (), *, itself: bool = True) -> None:
        self.prediction_tokens = len(prediction)
        self._ends = tuple(ends)
        self._itself = itself
        self._begun = False
        self.tokens: list[int] = []
        # The places after each token, in order.
        self._after: dict[int, list[int]] = {}
        for token in (*prediction, END) if prediction else ():
            self._add(token)
        prior = (PREDICTED_PRIOR, *PRIOR[1:]) if prediction else PRIOR
        self._trust = Trust(prior)
        # Where the answer is, as far as is known, and its tokens since.
        self._place, self._since = NOWHERE, MOST_REPLACED
        self._matches: list[Match] = []
        self._next: list[Level] | None = None
        self._found = bytearray(len(prediction))

    @property
    def found(self) -> int:
        """The tokens of the prediction that were found in the answer, each counted once."""
        return sum(self._found)

    def shortlist(self, max_rows: int) -> int:
        """See `DraftSource.shortlist`: pseudo rows are not read."""
        return 0

    def accept(self, tokens: Sequence[int]) -> None:
        """See `DraftSource.accept`. The first time it is the prompt and the answer's first token."""
        if not self._begun and tokens:
            self._begin(tokens[:-1])
            tokens = tokens[-1:]
        for token in tokens:
            self._trust.learn(self._levels_now(), token)
            self._follow(token)

    def propose(self, context: Context) -> Tree:
        """See `DraftSource.propose`: the text ends with the certain token."""
        if not self._matches:
            return root_alone(context.token)
        return grow(
            context,
            self._matches,
            lambda matches, path: self._levels(matches, path) if path else self._levels_now(),
            self._advanced,
        )

    def trust(self, where: Where, matched: int) -> float:
        """Return how probable it is that what follows matches of so many tokens there follows again."""
        return self._trust.of(where, matched)

    def _add(self, token: int) -> None:
        self.tokens.append(token)
        self._after.setdefault(token, []).append(len(self.tokens))

    def _begin(self, prompt: Sequence[int]) -> None:
        """Take the prompt, and begin with the prediction: nobody guesses the tokens of the prompt."""
        self._begun = True
        if prompt:
            last = prompt[-STEPS[-1] :]
            for token in prompt if self._itself else ():
                self._add(token)
            places = [place for place in self._places(last[-1]) if place < len(self.tokens)]
            self._matches = [Match(place, self._common(place, last), Where.FAR) for place in places]
        if self.prediction_tokens:
            self._place = self._since = 0
            self._matches.append(Match(0, BEGINNING, Where.EXPECTED))

    def _common(self, place: int, last: Sequence[int]) -> int:
        """Return how many of the `last` tokens are those before `place`."""
        most = min(place, len(last))
        matched = 0
        while matched < most and self.tokens[place - 1 - matched] == last[-1 - matched]:
            matched += 1
        return matched

    def _places(self, token: int) -> list[int]:
        """Return earlier places after `token`: those around where the answer is thought to be, then the latest."""
        places = self._after.get(token, [])
        latest = places[: -LATEST - 1 : -1]
        if self._place == NOWHERE or len(places) <= LATEST:
            return latest
        middle = bisect_left(places, self._place)
        return latest + places[max(0, middle - BEFORE) : min(len(places) - LATEST, middle + AFTER)][::-1]

    def _follow(self, token: int) -> None:
        """Take the answer's next token."""
        matches = self._advanced(self._matches, token, ())
        known = {one.place for one in matches}
        there = self._place + 1 in known
        if there:
            self._place += 1
        elif self._place != NOWHERE:
            self._since += 1
        matches += [Match(place, 1, self._where(place)) for place in self._places(token) if place not in known]
        best = max(matches, key=lambda one: (one.matched, -one.where), default=None)
        if best is not None and best.matched >= FOUND[best.where]:
            self._place, self._since = best.place, 0
        elif not there and self._since <= PUT_IN:
            # As many words were replaced, or they were put in.
            known = {one.place for one in matches}
            places = (place for place in (self._place + self._since, self._place) if place not in known)
            matches += [Match(place, 0, Where.EXPECTED) for place in places if place < len(self.tokens)]
        self._mark(matches)
        if self._itself:
            self._add(token)
        self._matches, self._next = matches, None

    def _mark(self, matches: Sequence[Match]) -> None:
        """Take note of the tokens of the prediction that the answer has just said."""
        said = [one for one in matches if one.place <= self.prediction_tokens and one.matched >= FOUND[one.where]]
        if said:
            place, matched, _ = max(said, key=lambda one: (one.matched, -one.where))
            start = max(0, place - matched)
            self._found[start:place] = bytes([True]) * (place - start)

    def _where(self, place: int) -> Where:
        start = self._place
        if start <= place <= start + min(self._since, MOST_REPLACED) + 1:
            return Where.EXPECTED
        return Where.NEAR if start - BACK <= place <= start + self._since + AHEAD else Where.FAR

    def _advanced(self, matches: Iterable[Match], token: int, path: tuple[int, ...]) -> list[Match]:
        """Return those of `matches` after `path` that go on with `token`, one further."""
        text, end = self.tokens, len(self.tokens)
        return [
            Match(place + 1, matched + 1, where)
            for place, matched, where in matches
            if (text[place] if place < end else path[place - end]) == token
        ]

    def _levels(self, matches: Sequence[Match], path: tuple[int, ...] = ()) -> list[Level]:
        """Return what may follow `matches` after `path`, the surest first; each token once."""
        text, end = self.tokens, len(self.tokens)
        following: list[tuple[Where, int, tuple[int, ...]]] = []
        for place, matched, where in matches:
            if place < end:
                token = text[place]
            elif place - end < len(path):
                token = path[place - end]
            else:
                continue
            following.append((where, matched, (token,) if token != END else self._ends))
        return self._trust.levels(following)

    def _levels_now(self) -> list[Level]:
        if self._next is None:
            self._next = self._levels(self._matches)
        return self._next
