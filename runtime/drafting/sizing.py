"""Chooses the sizes to run a step with: those that bring the most tokens in the least time.

A *menu* holds the sizes that an engine may run, each with its measured time. For every step the best-first tree says
how many tokens to expect of its first T nodes, and pseudo rows are worth what drafts have been worth in the step after.
Decoding forever at the best rate, a step's worth is then

    expected tokens + value of the drafts that it leaves - max(1.0, self.rate) * time,

and the size with the highest worth is taken; one token without drafts is on the menu too. What drafts bring is
watched: when fewer tokens are accepted than their probabilities promise, all promises are cut, down to plain decoding,
from where drafts are tried again now and then. Whatever they promise, no step may cost more than what drafts have
brought before and a small credit: a text that they are useless for takes hardly longer than plain decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.arrays import FloatArray, IntArray
from runtime.tree import Tree, TreeSizes

# Weight of what was seen before against one more step: about 25 steps are remembered.
MEMORY = 0.96
# Prior weight of the promises of drafts, in tokens, and of the rate, in passes.
PRIOR_TOKENS = 8.0
RATE_PASSES = 16.0
# Learning rate of the worth of drafts.
DRAFT_VALUE_STEP = 0.08
# Steps without drafts before they are tried again; doubled each time that they were not worth it.
FIRST_PAUSE = 4
LONGEST_PAUSE = 64
# Passes that drafts may cost before they bring anything, and on top for each pass; of what they bring, what is kept for
# later.
FIRST_CREDIT = 1.5
PASS_CREDIT = 0.015
MOST_CREDIT = 4.0
# What the drafts of one node are worth, in tokens, before anything is known.
DRAFT_VALUE = 0.5
# Rows of trees with a long path that is nearly certain, where there are any.
LONG_PATHS = (12, 16, 24, 32, 48, 64)
# Worth of the drafts of each step, relative to each other.
STEP_VALUES = (0.62, 0.26, 0.12, 0.06, 0.03)


class Sizing(Protocol):
    """Chooses the sizes of each step."""

    @property
    def most_rows(self) -> int:
        """The largest tree that may be chosen."""
        ...

    @property
    def least(self) -> float:
        """The path probability below which no node is worth its time: none such need be proposed."""
        ...

    @property
    def draft_steps(self) -> int:
        """The number of draft steps that may get pseudo rows."""
        ...

    def choose(self, tree: Tree, context: int, drafted: bool) -> TreeSizes:
        """Return the sizes for a step that may verify the first nodes of `tree` after `context` cached tokens.

        `drafted` says whether the pass before drafted for it.
        """
        ...

    def learn(self, accepted: int) -> None:
        """Take note that the step chosen last accepted so many drafted tokens."""
        ...


class FixedSizes:
    """The same sizes for every step."""

    def __init__(self, sizes: TreeSizes) -> None:
        self.sizes = sizes

    @property
    def most_rows(self) -> int:
        """See `Sizing.most_rows`."""
        return self.sizes.tree_rows

    @property
    def least(self) -> float:
        """See `Sizing.least`: rows that are run anyway cost nothing."""
        return 0.0

    @property
    def draft_steps(self) -> int:
        """See `Sizing.draft_steps`."""
        return self.sizes.draft_steps

    def choose(self, tree: Tree, context: int, drafted: bool) -> TreeSizes:
        """See `Sizing.choose`."""
        return self.sizes

    def learn(self, accepted: int) -> None:
        """See `Sizing.learn`."""


@dataclass(frozen=True)
class Menu:
    """Sizes that may be chosen, N of them, the first those of plain decoding; and the time that a step of each takes.

    seconds [C, N] at C contexts [C], in tokens cached, ascending; linear between and beyond them.
    """

    sizes: tuple[TreeSizes, ...]
    contexts: tuple[int, ...]
    seconds: FloatArray

    def at(self, context: int) -> FloatArray:
        """Return the seconds [N] of each size with `context` tokens in the cache."""
        if len(self.contexts) == 1:
            return self.seconds[0]
        upper = min(max(1, int(np.searchsorted(self.contexts, context))), len(self.contexts) - 1)
        start, end = self.contexts[upper - 1], self.contexts[upper]
        share = max(0.0, (context - start) / (end - start))
        found = self.seconds[upper - 1] * (1 - share) + self.seconds[upper] * share
        # Where a longer context was faster by chance, steps would end before they began.
        return np.maximum(found, self._fastest)

    def settled(self) -> Menu:
        """Return the menu with no size slower than one that has all of its rows and more.

        What disturbs a step while it is measured makes it longer only, so a larger step's time bounds a smaller one's.
        Without that a busy machine may have a menu in which nothing but some chance size pays.
        """
        rows = np.array([[one.tree_rows, *one.pseudo_rows] for one in self.sizes])
        holds: NDArray[np.bool_] = np.all(rows[None] >= rows[:, None], axis=-1)
        bounded = np.where(holds, self.seconds[:, None], np.inf).min(-1)
        return replace(self, seconds=bounded)

    def longer(self, most_rows: int) -> Menu:
        """Return a menu with larger trees too, of up to `most_rows`, for paths that are nearly certain: without pseudo
        rows, and with one for each step.

        Their times are not measured. Rows cost the same each, as far as they matter here: what those of this menu cost
        in the mean is what more of them are taken to cost.
        """
        most = int(self.tree_rows.max())
        steps = len(self.sizes[0].pseudo_rows)
        one = tuple(int(step < self.draft_steps) for step in range(steps))
        more = [rows for rows in LONG_PATHS if most < rows <= most_rows]
        added = tuple(dict.fromkeys(TreeSizes(rows, pseudo) for rows in more for pseudo in ((0,) * steps, one)))
        if most == 1 or not added:
            return self
        counted = np.array([[one.tree_rows - 1, sum(one.pseudo_rows)] for one in self.sizes])
        wanted = np.array([[one.tree_rows - 1, sum(one.pseudo_rows)] for one in added])
        plain = self.seconds[:, :1]
        # Cost [2, C] of a row and of a pseudo row; by chance one may seem to cost nothing.
        cost = np.linalg.lstsq(counted, (self.seconds - plain).T, rcond=None)[0].clip(min=0.0)
        return Menu((*self.sizes, *added), self.contexts, np.hstack([self.seconds, plain + (wanted @ cost).T]))

    def promised(self, tree: Tree) -> FloatArray:
        """Return [N]: the drafted tokens that a step of each size may expect to accept of the best-first `tree`."""
        return np.cumsum(tree.probabilities)[np.minimum(self.tree_rows, len(tree)) - 1] - 1.0

    def left_drafted(self, tree: Tree) -> FloatArray:
        """Return [N]: the share of one node's drafts that each size may expect to leave to the next step."""
        tops, top_of = self._tops
        nodes = np.arange(len(tree))
        # For each T on the menu, the probabilities that acceptance ends at each of the tree's first T nodes, summed
        # from the likeliest on.
        paths = np.where(nodes < tops[:, None], tree.probabilities, 0.0)
        child_of = (tree.parents[:, None] == nodes).astype(np.float64)
        ends = paths - paths @ child_of
        ends.sort(axis=1)
        covered = np.zeros((len(tops), len(tree) + 1))
        np.cumsum(ends[:, ::-1], axis=1, out=covered[:, 1:])
        pseudo_rows = np.minimum(self._pseudo_rows, len(tree))
        return covered[top_of[:, None], pseudo_rows] @ self._step_values

    @property
    def draft_steps(self) -> int:
        """The number of draft steps that some size has pseudo rows for."""
        return max(sizes.draft_steps for sizes in self.sizes)

    @cached_property
    def tree_rows(self) -> IntArray:
        """T of each size [N]."""
        return np.array([sizes.tree_rows for sizes in self.sizes])

    @cached_property
    def cheapest_row(self) -> float:
        """The time of a row of a tree, in plain steps, at the context and in the sizes where it is the least."""
        more = self.tree_rows > 1
        if not more.any():
            return 0.0
        beyond = self.seconds[:, more] / self.seconds[:, :1] - 1.0
        return max(0.0, float((beyond / (self.tree_rows[more] - 1)).min()))

    @cached_property
    def drafts(self) -> NDArray[np.bool_]:
        """Tells of each size [N] whether it has pseudo rows."""
        return np.array([any(sizes.pseudo_rows) for sizes in self.sizes])

    @cached_property
    def _tops(self) -> tuple[IntArray, IntArray]:
        # The different tree sizes, and which of them each has.
        tops, top_of = np.unique(self.tree_rows, return_inverse=True)
        return tops, top_of

    @cached_property
    def _step_values(self) -> FloatArray:
        # What pseudo rows of each step are worth, of one [K].
        values = np.array(STEP_VALUES[: len(self.sizes[0].pseudo_rows)])
        return values / values.sum()

    @cached_property
    def _pseudo_rows(self) -> IntArray:
        # Those of each size [N, K].
        return np.array([sizes.pseudo_rows for sizes in self.sizes])[:, : len(self._step_values)]

    @cached_property
    def _fastest(self) -> FloatArray:
        return self.seconds.min(axis=0)


@dataclass(frozen=True)
class BatchMenu:
    """The menu of passes of so many `requests`, all of them of one size."""

    requests: int
    menu: Menu


class AdaptiveSizes:
    """Sizes from a menu, by the probabilities of each tree and by what drafts have brought so far in this text.

    Time is counted in plain steps. `rate`, the tokens of a plain step's time, and `draft_value`, the tokens that the
    drafts of one node add to the next step beyond their cost, are what to begin with.
    """

    def __init__(self, menu: Menu, rate: float = 1.0, draft_value: float = DRAFT_VALUE) -> None:
        self.menu = menu
        self._plain_rows = menu.tree_rows == 1
        self._time = RATE_PASSES
        self._tokens = rate * RATE_PASSES
        self._kept = self._promised = 0.0
        self._draft_value = draft_value
        self._pause = FIRST_PAUSE
        self._idle = 0
        self._credit = FIRST_CREDIT
        self._last = (0.0, 1.0)

    def with_longer_paths(self, most_rows: int) -> AdaptiveSizes:
        """Return the same at its beginning, with trees of up to `most_rows` on the menu: see `Menu.longer`."""
        return AdaptiveSizes(self.menu.longer(most_rows), self._tokens / self._time, self._draft_value)

    @property
    def believed(self) -> float:
        """The share of what drafts promise that they have kept, lately."""
        return (self._kept + PRIOR_TOKENS) / (self._promised + PRIOR_TOKENS)

    @property
    def rate(self) -> float:
        """Tokens in the time of a plain pass, lately."""
        return self._tokens / self._time

    @property
    def draft_value(self) -> float:
        """Tokens that the drafts of one node add to the step after, beyond their cost, lately."""
        return self._draft_value

    @property
    def most_rows(self) -> int:
        """See `Sizing.most_rows`."""
        return int(self.menu.tree_rows.max())

    @property
    def least(self) -> float:
        """See `Sizing.least`. Drafts may be believed more than they say, not twice as much."""
        return self.menu.cheapest_row / 2

    @property
    def draft_steps(self) -> int:
        """See `Sizing.draft_steps`."""
        return self.menu.draft_steps

    def choose(self, tree: Tree, context: int, drafted: bool) -> TreeSizes:
        """See `Sizing.choose`."""
        seconds = self.menu.at(context)
        time = seconds / seconds[0]
        promised = self.menu.promised(tree)
        left = self.menu.left_drafted(tree)
        worth = self.believed * promised + self._draft_value * left - max(1.0, self.rate) * time
        if drafted:
            gain = float(worth.max() - worth[self._plain_rows].max())
            self._draft_value += DRAFT_VALUE_STEP * (gain - self._draft_value)
            self._pause = FIRST_PAUSE if gain > 0.0 else min(2 * self._pause, LONGEST_PAUSE)
        # Drafts tried again are made for nothing unless the step after can pay for verifying them.
        risk = np.where(self.menu.drafts & (not drafted), 2.0, 1.0)
        affordable = risk * (time - 1.0) <= self._credit
        best = int(np.argmax(np.where(affordable, worth, -np.inf)))
        self._idle = 0 if self.menu.drafts[best] else self._idle + 1
        if self._idle > self._pause and (affordable & self.menu.drafts).any():
            best = int(np.argmax(np.where(affordable & self.menu.drafts, worth, -np.inf)))
            self._idle = 0
        self.chosen(float(promised[best]), float(time[best]))
        return self.menu.sizes[best]

    def chosen(self, promised: float, time: float) -> None:
        """Take note of what a size that was chosen promises in drafted tokens, and of its time in plain steps."""
        self._last = (promised, time)

    def learn(self, accepted: int) -> None:
        """See `Sizing.learn`."""
        promised, time = self._last
        self._kept = MEMORY * self._kept + accepted
        self._promised = MEMORY * self._promised + promised
        self._tokens = MEMORY * self._tokens + accepted + 1
        self._time = MEMORY * self._time + time
        self._credit = min(self._credit + accepted + 1 - time + PASS_CREDIT, MOST_CREDIT)
