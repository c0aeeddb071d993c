"""Other answers as a draft source: what followed in a pool of them when the text's last tokens were there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from runtime.drafting.continuations import STEPS, Level, Path, Trust, grow
from runtime.drafting.source import Context
from runtime.drafting.text_pool import NOTHING, TextPool
from runtime.tree import Tree, root_alone

# Places looked at anew after each token, the latest; and places followed at once, those that match longest.
LATEST, FOLLOWED = 8, 16
# The trust to begin with, by `STEPS`, is about the share of tokens after such a match that were right in 150 answers of
# SmolLM2-135M beside a pool of 2,038 others. Shorter matches than two tokens there are none.
PRIOR = ((0.0, 0.0, 0.35, 0.37, 0.46, 0.58, 0.7, 0.78, 0.85, 0.9),)

Match = tuple[int, int]


class PoolDrafts:
    """What may follow a text by what `pool` holds. Which answers that are changes while it drafts."""

    name = "pool"

    def __init__(self, pool: TextPool) -> None:
        self._pool = pool
        self._trust = Trust(PRIOR)
        self._begun = False
        self._last: list[int] = []
        # Each a place in the pool, whose token may follow, and how many tokens before it match.
        self._matches: list[Match] = []

    def shortlist(self, max_rows: int) -> int:
        """See `DraftSource.shortlist`: pseudo rows are not read."""
        return 0

    def accept(self, tokens: Sequence[int]) -> None:
        """See `DraftSource.accept`. The first time it is the prompt and the answer's first token."""
        if not self._begun and tokens:
            self._begun = True
            # Nobody guesses the tokens of the prompt, and only its last ones can match.
            for token in tokens[-STEPS[-1] - 1 : -1]:
                self._follow(token)
            tokens = tokens[-1:]
        for token in tokens:
            if self._matches:
                self._trust.learn(self._levels(self._matches, ()), token)
            self._follow(token)

    def propose(self, context: Context) -> Tree:
        """See `DraftSource.propose`: the text ends with the certain token."""
        if not self._matches:
            return root_alone(context.token)
        return grow(context, self._matches, self._levels, self._advanced)

    def _follow(self, token: int) -> None:
        """Take the answer's next token."""
        pool = self._pool
        matches = self._advanced(self._matches, token, ())
        last = self._last = [*self._last[1 - STEPS[-1] :], token]
        if len(last) > 1:
            known = {place for place, _ in matches}
            for place in islice(pool.places(last[-2], token), LATEST):
                if place not in known:
                    matches.append((place, pool.common(place, last, STEPS[-1])))
        matches.sort(key=lambda one: (-one[1], -one[0]))
        self._matches = matches[:FOLLOWED]

    def _advanced(self, matches: Iterable[Match], token: int, path: Path) -> list[Match]:
        """Return those of `matches` that go on with `token`, one further."""
        at = self._pool.at
        return [(place + 1, matched + 1) for place, matched in matches if at(place) == token]

    def _levels(self, matches: Iterable[Match], path: Path) -> list[Level]:
        """Return what may follow `matches`, the surest first."""
        at = self._pool.at
        following = ((matched, at(place)) for place, matched in matches)
        return self._trust.levels((0, matched, (token,)) for matched, token in following if token != NOTHING)
