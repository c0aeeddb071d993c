"""Trees within a grammar: what it forbids is left out, and what it forces is drafted.

A candidate that the grammar forbids is never chosen, so its row would be wasted; the odds of those beside it rise by
what it had. Where a text must follow, its usual tokens are drafted below the node, at the root and everywhere else: a
property's name follows from its first letters. How often those have been chosen in this text says how far to trust
them, as other tokens may spell the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from runtime.drafting.best_first import by_falling_probability
from runtime.grammar.matcher import Matcher
from runtime.tree import Tree

# Shares of forced tokens that were chosen in development texts: of those followed by another one, and of the last ones
# of a forced text, which may end within a token; and their weight against what is seen in a text.
PRIOR = (0.95, 0.7)
PRIOR_WEIGHT = 4.0
# Candidates that sources are asked for, for each row of a tree: some are forbidden.
SPARE = 2
# No candidate is thought impossible.
LEAST_LEFT = 0.01


@dataclass(order=True)
class _Candidate:
    """A node that may come into the tree: of more `probability` first, then the one found earlier."""

    key: tuple[float, int]
    parent: int = field(compare=False)
    token: int = field(compare=False)
    # Its probability, given its parent.
    given: float = field(compare=False)
    # Its place in the tree that was proposed, -1 for none; and the forced tokens after it.
    place: int = field(compare=False)
    rest: tuple[int, ...] = field(compare=False, default=())


class GrammarDrafts:
    """Shapes the trees of one answer by the grammar that its `matcher` is of."""

    def __init__(self, matcher: Matcher, *, forced: bool = True) -> None:
        self._matcher = matcher
        self._forced = forced
        self._right = [share * PRIOR_WEIGHT for share in PRIOR]
        self._tried = [PRIOR_WEIGHT] * len(PRIOR)
        # Of the tree shaped last: children by parent and token, and forced tokens, with whether they are a text's last.
        self._children: dict[tuple[int, int], int] = {}
        self._guesses: dict[int, tuple[int, int]] = {}

    def shape(self, tree: Tree, max_rows: int) -> tuple[Tree, frozenset[int]]:
        """Return the `max_rows` most probable nodes of `tree` and of forced tokens, without what is forbidden, and
        those among them that are forced, whoever proposed them.
        """
        return _Shaping(self._matcher, tree, self._trusts()).shape(max_rows, self._children, self._guesses)

    def _trusts(self) -> tuple[float, ...]:
        if not self._forced:
            return ()
        return tuple(right / tried for right, tried in zip(self._right, self._tried, strict=True))

    def accept(self, tokens: Sequence[int]) -> None:
        """Take the tokens that became certain after the tree's root."""
        node: int | None = 0
        for token in tokens:
            if node is None:
                break
            if guess := self._guesses.get(node):
                forced, last = guess
                self._tried[last] += 1
                self._right[last] += token == forced
            node = self._children.get((node, token))
        self._children.clear()
        self._guesses.clear()


class _Shaping:
    """One tree on its way."""

    def __init__(self, matcher: Matcher, tree: Tree, trusts: Sequence[float]) -> None:
        self._matcher = matcher
        self._tree = tree
        self._trusts = trusts
        self._below: list[list[int]] = [[] for _ in range(len(tree))]
        for node, parent in enumerate(tree.parents[1:].tolist(), start=1):
            self._below[parent].append(node)
        self._tokens = tree.tokens.tolist()
        self._paths = tree.probabilities.tolist()
        self._heap: list[_Candidate] = []
        self._count = 0
        # The nodes that the matcher is at, from the root's child down.
        self._at: list[int] = []

    def shape(
        self, max_rows: int, children: dict[tuple[int, int], int], guesses: dict[int, tuple[int, int]]
    ) -> tuple[Tree, frozenset[int]]:
        """See `GrammarDrafts.shape`; `children` and `guesses` are filled."""
        tokens, parents, depths, paths = [self._tokens[0]], [-1], [0], [1.0]
        # What forbidden candidates below each node had.
        lost = [0.0]
        children.clear()
        guesses.clear()
        if max_rows > 1:
            self._expand(0, 0, (), paths, lost, guesses)
        while self._heap and len(tokens) < max_rows:
            found = heapq.heappop(self._heap)
            parent = found.parent
            # Siblings of several sources may have more than 1 together; no child is likelier than its parent.
            path = min(paths[parent] * found.given / max(LEAST_LEFT, 1.0 - lost[parent]), paths[parent])
            if path > -found.key[0] * (1 + 1e-9):
                # Others beside it were forbidden since.
                self._push(path, found)
                continue
            self._go(parent, parents, tokens)
            if not self._matcher.allows(found.token):
                lost[parent] += found.given
                continue
            node = len(tokens)
            children[parent, found.token] = node
            tokens.append(found.token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            paths.append(min(-found.key[0], paths[parent]))
            lost.append(0.0)
            if len(tokens) < max_rows:
                self._go(node, parents, tokens)
                self._expand(node, found.place, found.rest, paths, lost, guesses)
        self._matcher.pop(len(self._at))
        forced = [child for (parent, token), child in children.items() if guesses.get(parent, (-1,))[0] == token]
        # They come by falling probabilities, but for rounding and for odds that rose.
        tree, new = by_falling_probability(tokens, parents, depths, paths)
        return tree, frozenset(new[node] for node in forced)

    def _expand(
        self,
        node: int,
        place: int,
        rest: tuple[int, ...],
        paths: Sequence[float],
        lost: list[float],
        guesses: dict[int, tuple[int, int]],
    ) -> None:
        """Consider what may follow `node`, which the matcher is at."""
        given: dict[int, tuple[float, int]] = {}
        above = self._paths[place] if place >= 0 else 0.0
        for child in self._below[place] if place >= 0 else ():
            given[self._tokens[child]] = (self._paths[child] / above if above > 0.0 else 0.0, child)
        if not node and given:
            # Its mask is needed for the next choice in any case.
            allowed = self._matcher.allowed()
            lost[0] = sum(share for token, (share, _) in given.items() if not allowed[token])
            given = {token: found for token, found in given.items() if allowed[token]}
        following: tuple[int, ...] = ()
        if self._trusts:
            following = rest or self._matcher.forced()
        if following:
            last = int(len(following) == 1)
            trust = self._trusts[last]
            guesses[node] = (following[0], last)
            left = max(LEAST_LEFT, 1.0 - lost[node])
            given = {token: (share / left * (1 - trust), child) for token, (share, child) in given.items()}
            share, child = given.get(following[0], (0.0, -1))
            given[following[0]] = (share + trust, child)
            lost[node] = 0.0
        for token, (share, child) in given.items():
            path = min(1.0, share / max(LEAST_LEFT, 1.0 - lost[node])) * paths[node]
            forced = following[1:] if following and token == following[0] else ()
            self._push(path, _Candidate((0.0, 0), node, token, share, child, forced))

    def _push(self, path: float, candidate: _Candidate) -> None:
        candidate.key = (-path, self._count)
        self._count += 1
        heapq.heappush(self._heap, candidate)

    def _go(self, node: int, parents: Sequence[int], tokens: Sequence[int]) -> None:
        """Have the matcher at `node`: what its path shares with that of the node before is kept."""
        way: list[int] = []
        while node:
            way.append(node)
            node = parents[node]
        way.reverse()
        shared = 0
        while shared < min(len(way), len(self._at)) and way[shared] == self._at[shared]:
            shared += 1
        self._matcher.pop(len(self._at) - shared)
        del self._at[shared:]
        for one in way[shared:]:
            self._matcher.push(tokens[one])
            self._at.append(one)
