"""Continuations from the text itself: what followed when its last tokens were there before (prompt lookup).

Text that quotes, edits or repeats itself can be drafted this way without any pass, at every depth. The tokens that end
the text are looked up with the longest match that there is; how often matches of that length have been right in this
text says how far to trust one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.drafting.source import Context
from runtime.tree import Tree, candidate_path

SHORTEST = 2
LONGEST = 8
# Prior: the share of development texts in which the token after a match of 2, 3, ... tokens was right; and its weight
# against what is seen in a text.
PRIOR = (0.35, 0.5, 0.6, 0.68, 0.74, 0.78, 0.8)
PRIOR_WEIGHT = 8.0


@dataclass(frozen=True)
class Continuation:
    """The tokens [N] that followed an earlier match, and the probability of each, given that those before are right."""

    tokens: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    matched: int = 0


class Ngrams:
    """An index of a growing text by its pairs of tokens, and the draft source that reads it."""

    name = "n-grams"

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self._after: dict[tuple[int, int], int] = {}
        self._before: list[int] = []
        self._right = [weight * PRIOR_WEIGHT for weight in PRIOR]
        self._tried = [PRIOR_WEIGHT] * len(PRIOR)
        self._proposed = Continuation()
        self.extend(tokens)

    def shortlist(self, max_rows: int) -> int:
        """See `DraftSource.shortlist`: pseudo rows are not read."""
        return 0

    def propose(self, context: Context) -> Tree:
        """See `DraftSource.propose`: the text ends with the certain token, and goes on as it did before."""
        self._proposed = self.continuation(context.max_rows - 1)
        return candidate_path(context.token, self._proposed.tokens, self._proposed.probabilities)

    def accept(self, tokens: Sequence[int]) -> None:
        """See `DraftSource.accept`."""
        self.learn(self._proposed, tokens)
        self._proposed = Continuation()
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take the tokens that follow."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            # Where the last pair was before, if it was: a chain through all its places, the latest first.
            pair = (self.tokens[end - 2], token) if end > 1 else (-1, token)
            self._before.append(self._after.get(pair, 0))
            self._after[pair] = end

    def continuation(self, count: int) -> Continuation:
        """Return up to `count` tokens that may follow."""
        end, matched = self._longest_match()
        if not matched:
            return Continuation()
        tokens = tuple(self.tokens[end : end + count])
        return Continuation(tokens, tuple(self.trust(matched + depth) for depth in range(len(tokens))), matched)

    def learn(self, continuation: Continuation, followed: Sequence[int]) -> None:
        """Take note of how `continuation` fared, where the text went on with `followed`."""
        for depth, (guess, token) in enumerate(zip(continuation.tokens, followed, strict=False)):
            index = min(continuation.matched + depth, LONGEST) - SHORTEST
            self._tried[index] += 1
            if guess != token:
                break
            self._right[index] += 1

    def trust(self, matched: int) -> float:
        """Return how probable it is that the token after a match of so many tokens is right."""
        index = min(matched, LONGEST) - SHORTEST
        return self._right[index] / self._tried[index]

    def _longest_match(self) -> tuple[int, int]:
        """Return where the longest match for the text's end ends, the latest of several, and its length; or (0, 0)."""
        tokens, end = self.tokens, len(self.tokens)
        found, longest = 0, 0
        place = self._before[-1] if end else 0
        looked_at = 0
        while place and longest < LONGEST and looked_at < 64:
            matched = SHORTEST
            while matched < LONGEST and matched < place and tokens[place - 1 - matched] == tokens[end - 1 - matched]:
                matched += 1
            if matched > longest:
                found, longest = place, matched
            place = self._before[place - 1]
            looked_at += 1
        return found, longest
