"""One budget of rows for all requests that decode in one pass, on an engine that packs them.

A row costs the same whoever has it, so the candidates of all trees compete: one is verified where the tokens that it
may bring are worth more than its time, and a node gets a pseudo row where the drafts for it are. That is the best
choice of all wherever a pass of trees pays for what it costs beyond a plain one; otherwise the pass is plain. With
many requests that is soon so: then drafts rest, and are tried again now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.drafting.drafter import Offer
from runtime.drafting.sizing import STEP_VALUES, AdaptiveSizes, BatchMenu, FixedSizes
from runtime.engines.protocol import Batch
from runtime.scheduling.experience import LONGEST_PAUSE, Experience
from runtime.scheduling.job import Job
from runtime.scheduling.pass_times import PassTimes
from runtime.tree import TreeSizes

# Of the first drafts, about the most that are accepted where transfer layers are at their best.
BEST = 0.75
# Prices to try, in terms of the right one, where a pass would cost more than it may.
PRICES = (1.0, 2.0, 4.0)


@dataclass(frozen=True)
class _Choice:
    """Sizes of each request, what they promise each in drafted tokens; rows beyond the roots, pseudo rows, and what all
    of them are worth beyond their cost, in tokens.
    """

    sizes: list[TreeSizes]
    promised: list[float]
    rows: int
    pseudo_rows: int
    worth: float


class RowBudget:
    """Chooses what each request of a pass verifies and drafts, by the times of passes of so many (`menus`)."""

    def __init__(self, menus: Sequence[BatchMenu]) -> None:
        self._menus = sorted(menus, key=lambda menu: menu.requests)
        self._times: dict[int, PassTimes] = {}
        self._experience: dict[int, Experience] = {}
        # Those of the pass chosen last, and its time in plain passes.
        self._last: tuple[Experience, float] | None = None

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Let the drafts of these jobs, which decode together, rest or not: before any of them makes an offer."""
        rests = self._menu(len(jobs)) is not None and self._learned(jobs).rests
        for job in jobs:
            if job.offer is None and isinstance(job.state.drafter.sizing, AdaptiveSizes):
                job.state.drafter.rests = rests or self._beyond(len(jobs))

    def choose(self, jobs: Sequence[Job]) -> dict[Job, TreeSizes]:
        """Return the sizes of the jobs that have an offer and no sizes of their own; none for a job that is alone."""
        self._last = None
        offering = [
            (job, job.offer, sizing)
            for job in jobs
            if job.offer is not None and isinstance(sizing := job.state.drafter.sizing, AdaptiveSizes)
        ]
        if not offering or self._menu(len(jobs)) is None:
            return {}
        learned, times = self._learned(jobs), self._times_of(len(jobs))
        if self._beyond(len(jobs)) or all(job.state.drafter.rests for job, _, _ in offering):
            learned.idle += 1
            found, time = _plain(offering), 1.0
        else:
            found, time = _best(jobs, offering, learned, times)
        self._last = (learned, time)
        for (_, _, sizing), promised in zip(offering, found.promised, strict=True):
            sizing.chosen(promised, time)
        return {job: sizes for (job, _, _), sizes in zip(offering, found.sizes, strict=True)}

    def learn(self, tokens: Sequence[int]) -> None:
        """Take note of how many tokens the pass chosen last made certain for each request."""
        if self._last is not None and tokens:
            learned, time = self._last
            learned.learn(sum(tokens) / len(tokens), time)

    def took(self, batch: Batch, seconds: float) -> None:
        """Take note of how long the pass of `batch` took, the one chosen last."""
        if self._last is None or self._menu(len(batch)) is None:
            return
        rows = sum(len(rows.input_ids) for rows in batch.rows) - len(batch)
        pseudo_rows = sum(sum(rows.counts) for rows in batch.rows)
        # Lengths are those after it: what it made certain is little.
        context = sum(batch.lengths) // len(batch)
        self._times_of(len(batch)).learn(context, rows, pseudo_rows, seconds)

    def _menu(self, requests: int) -> BatchMenu | None:
        """Return what was measured of so many requests, or of the next larger number: rows are dearer the more requests
        there are. None for one request, and where nothing was measured.
        """
        if requests < 2 or not self._menus:
            return None
        return next((menu for menu in self._menus if menu.requests >= requests), self._menus[-1])

    def _beyond(self, requests: int) -> bool:
        """Return whether there are far more requests than were ever measured: then none of them speculates."""
        return bool(self._menus) and requests > 2 * self._menus[-1].requests

    def _times_of(self, requests: int) -> PassTimes:
        if requests not in self._times:
            menu = self._menu(requests)
            assert menu is not None
            self._times[requests] = PassTimes(menu, requests)
        return self._times[requests]

    def _learned(self, jobs: Sequence[Job]) -> Experience:
        menu = self._menu(len(jobs))
        assert menu is not None
        if menu.requests not in self._experience:
            self._experience[menu.requests] = Experience.of(job.state.drafter.sizing for job in jobs)
        return self._experience[menu.requests]


Offering = Sequence[tuple[Job, Offer, AdaptiveSizes]]


def _plain(offering: Offering) -> _Choice:
    sizes = [TreeSizes.plain(len(sizing.menu.sizes[0].pseudo_rows)) for _, _, sizing in offering]
    return _Choice(sizes, [0.0] * len(offering), 0, 0, 0.0)


def _best(jobs: Sequence[Job], offering: Offering, learned: Experience, times: PassTimes) -> tuple[_Choice, float]:
    """Return the best sizes of those that offer, and the time of the pass in plain ones."""
    # A pass that has trees anyway, of fixed sizes, costs what it costs.
    fixed = [sizing.sizes for job in jobs if isinstance(sizing := job.state.drafter.sizing, FixedSizes)]
    rows = sum(sizes.tree_rows - 1 for sizes in fixed)
    pseudo_rows = sum(sum(sizes.pseudo_rows) for sizes in fixed)
    given = times.relative(rows, pseudo_rows)
    drafted = sum(offer.drafted for _, offer, _ in offering)

    def time_of(choice: _Choice) -> float:
        return times.relative(rows + choice.rows, pseudo_rows + choice.pseudo_rows)

    # Tokens of all requests in the time of a plain pass.
    rate = max(1.0, learned.rate) * len(jobs)

    def priced(verify: bool, price: float = 1.0, least: int = 0) -> _Choice:
        found = _chosen(offering, learned.draft_value, rate * price * times.row, rate * price * times.pseudo_row,
                        verify=verify, least=least)  # fmt: skip
        cost = rate * (time_of(found) - given)
        return _Choice(found.sizes, found.promised, found.rows, found.pseudo_rows, found.worth - cost)

    plain, root, tree = _plain(offering), priced(verify=False), priced(verify=True)
    if drafted:
        learned.learn_worth((max(tree.worth, root.worth, 0.0) - max(root.worth, 0.0)) / drafted)

    def affordable(choice: _Choice) -> bool:
        return learned.affords(time_of(choice) - given + 1.0, drafted > 0, choice.pseudo_rows > 0)

    dearer = (priced(verify=True, price=price) for price in PRICES[1:])
    tree = next((one for one in (tree, *dearer) if affordable(one)), plain)
    best = max((one for one in (plain, root, tree) if affordable(one)), key=lambda one: one.worth)
    learned.idle = 0 if best.rows or best.pseudo_rows else learned.idle + 1
    if learned.idle > learned.pause:
        # Other sources are looked at every time. Drafts cost a pass: they are tried where they seem to be able to pay,
        # and seldom where they do not, as that may be wrong.
        tried = priced(verify=False, least=1)
        count = len(offering)
        pays = BEST * count > rate * (times.relative(count, count) - 1.0)
        if affordable(tried) and (pays or learned.pause == LONGEST_PAUSE):
            best = tried
            learned.idle = 0
        else:
            learned.lengthen_pause()
            learned.idle = 1
    return best, time_of(best)


def _chosen(
    offering: Offering, draft_value: float, row_price: float, pseudo_price: float, *, verify: bool, least: int
) -> _Choice:
    """Return what is worth its price in tokens: of each tree the first candidates, where they are to be verified at
    all, and the likeliest ends of each draft step, `least` for the first.
    """
    sizes, promises, worth = [], [], 0.0
    for _, offer, sizing in offering:
        probabilities = offer.tree.probabilities
        believed = sizing.believed
        count = 1
        if verify:
            # They fall from the root on.
            count += int(np.count_nonzero(believed * probabilities[1:] > row_price))
        promised = float(probabilities[1:count].sum())
        ends = np.sort(offer.tree.first(count).end_probabilities())[::-1] if count > 1 else np.ones(1)
        steps = len(sizing.menu.sizes[0].pseudo_rows)
        values = np.array(STEP_VALUES[:steps])
        values *= draft_value / values.sum()
        pseudo_rows = [0] * steps
        for step in range(min(steps, sizing.draft_steps)):
            wanted = int(np.count_nonzero(ends * values[step] > pseudo_price))
            pseudo_rows[step] = max(wanted, least if step == 0 else 0)
            worth += float(values[step] * ends[: pseudo_rows[step]].sum())
        worth += believed * promised
        promises.append(promised)
        sizes.append(TreeSizes(count, tuple(pseudo_rows)))
    return _Choice(
        sizes,
        promises,
        sum(one.tree_rows - 1 for one in sizes),
        sum(sum(one.pseudo_rows) for one in sizes),
        worth,
    )
