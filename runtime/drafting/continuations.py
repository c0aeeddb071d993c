"""What followed where a text said the same before: how far such places are trusted, and trees of what they say.

A place has `matched` tokens before it in common with the text's last ones, and is trusted the more the more they are
(as suffix trees do, SuffixDecoding 2411.04975). How far begins at what is usual and is learned in each answer.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from runtime.drafting.source import Context
from runtime.tree import Tree, root_alone, tree_of

# An earlier time counts for so much less than the next one.
FADES = 0.7
# Paths less probable than this cost more than they bring.
LEAST = 0.02
# Transfer layers have read the same text, so what both say counts for less than what two strangers say.
SHARED = 0.85
# A match of so many tokens or more has a trust of its own.
STEPS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24)
PRIOR_WEIGHT = 12.0
_STEP_OF = tuple(sum(step <= matched for step in STEPS) - 1 for matched in range(STEPS[-1] + 1))

Path = tuple[int, ...]
State = TypeVar("State")


class Level(NamedTuple):
    """Tokens that may follow, each with its probability, and the trust in all of them: its kind and step."""

    kind: int
    step: int
    tokens: dict[int, float]


class Trust:
    """How probable it is that what followed places of each kind follows again, by how many tokens matched: to begin
    with the `prior` [kinds, len(STEPS)], then by what was right.
    """

    def __init__(self, prior: Sequence[Sequence[float]]) -> None:
        self._right = [[share * PRIOR_WEIGHT for share in row] for row in prior]
        self._tried = [[PRIOR_WEIGHT] * len(STEPS) for _ in prior]

    def of(self, kind: int, matched: int) -> float:
        """Return the probability for matches of so many tokens."""
        step = _STEP_OF[min(matched, STEPS[-1])]
        return self._right[kind][step] / self._tried[kind][step]

    def levels(self, places: Iterable[tuple[int, int, Sequence[int]]]) -> list[Level]:
        """Return what may follow `places`, each with its kind, how many tokens matched and the tokens that may follow
        it, the latest first; the surest first, each token once.
        """
        weights: dict[tuple[int, int], dict[int, float]] = {}
        for kind, matched, tokens in places:
            step = _STEP_OF[matched] if matched < STEPS[-1] else len(STEPS) - 1
            found = weights.setdefault((kind, step), {})
            weight = FADES ** len(found)
            for one in tokens:
                found[one] = found.get(one, 0.0) + weight
        right, tried = self._right, self._tried
        trusted = sorted(((right[kind][step] / tried[kind][step], kind, step) for kind, step in weights), reverse=True)
        levels = []
        known: set[int] = set()
        left = 1.0
        for trust, kind, step in trusted:
            new = {token: weight for token, weight in weights[kind, step].items() if token not in known}
            if not new:
                continue
            share = left * trust / sum(new.values())
            levels.append(Level(kind, step, {token: share * weight for token, weight in new.items()}))
            known.update(new)
            left -= left * trust
            if left < LEAST:
                break
        return levels

    def learn(self, levels: Iterable[Level], token: int) -> None:
        """Take note of how what may have followed fared, where the text goes on with `token`."""
        for kind, step, tokens in levels:
            self._tried[kind][step] += 1
            if token in tokens:
                self._right[kind][step] += 1
                return


def grow(
    context: Context,
    begin: State,
    levels: Callable[[State, Path], Iterable[Level]],
    advanced: Callable[[State, int, Path], State],
) -> Tree:
    """Return the tree of what may follow `begin`, which stands for the text's end, best first.

    `levels` gives what may follow a state after the tokens that led to it from the root, and `advanced` the state that
    one more token leads to.
    """
    if context.max_rows == 1:
        return root_alone(context.token)
    tokens, parents, depths, probabilities = [context.token], [-1], [0], [1.0]
    paths: list[Path] = [()]
    states = [begin]
    # What may follow each node: less its path probability, a number that tells equals apart, the node, the token.
    heap: list[tuple[float, int, int, int]] = []
    least = max(LEAST, context.least)
    order = node = 0
    while True:
        above = probabilities[node] * (SHARED if context.drafted and not node else 1.0)
        for level in levels(states[node], paths[node]):
            for token, probability in level.tokens.items():
                path = above * probability
                if path >= least:
                    order += 1
                    heapq.heappush(heap, (-path, order, node, token))
        if not heap or len(tokens) == context.max_rows:
            break
        path, _, parent, token = heapq.heappop(heap)
        node = len(tokens)
        tokens.append(token)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        probabilities.append(-path)
        states.append(advanced(states[parent], token, paths[parent]))
        paths.append((*paths[parent], token))
    return tree_of(tokens, parents, depths, probabilities)
