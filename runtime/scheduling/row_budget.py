"""One budget of rows for all requests that decode in one pass, on an engine that packs them.

A row costs the same whoever has it, so the candidates of all trees compete: one is verified where the tokens that it
may bring are worth more than its time, and a node gets a pseudo row where the drafts for it are. That is the best
choice of all wherever a pass of trees pays for what it costs beyond a plain one; otherwise the pass is plain. With
many requests that is soon so: then drafts rest, and are tried again now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.drafting.sizing import STEP_VALUES, BatchMenu, FixedSizes
from runtime.engines.protocol import Batch
from runtime.scheduling.experience import LONGEST_PAUSE, Experience
from runtime.scheduling.job import Job
from runtime.scheduling.pass_sizes import BEST, Choice, Offering, PassSizes
from runtime.scheduling.pass_times import PassTimes
from runtime.tree import TreeSizes

# Prices to try, in terms of the right one, where a pass would cost more than it may.
PRICES = (1.0, 2.0, 4.0)


@dataclass(frozen=True)
class _Priced(Choice):
    """A choice of so many `rows` beyond the roots, and of pseudo rows; and the tokens that they are `worth` beyond
    their cost.
    """

    rows: int = 0
    pseudo_rows: int = 0
    worth: float = 0.0


class RowBudget(PassSizes):
    """Chooses what each request of a pass verifies and drafts, by times that every pass corrects."""

    def __init__(self, menus: Sequence[BatchMenu]) -> None:
        super().__init__(menus)
        self._times: dict[int, PassTimes] = {}

    def took(self, batch: Batch, seconds: float) -> None:
        """See `PassSizes.took`."""
        menu = self._menu(len(batch))
        if self._last is None or menu is None:
            return
        rows = sum(len(rows.input_ids) for rows in batch.rows) - len(batch)
        pseudo_rows = sum(sum(rows.counts) for rows in batch.rows)
        # Lengths are those after it: what it made certain is little.
        context = sum(batch.lengths) // len(batch)
        self._times_of(menu, len(batch)).learn(context, rows, pseudo_rows, seconds)

    def _best(self, jobs: Sequence[Job], offering: Offering, menu: BatchMenu, learned: Experience) -> Choice:
        """See `PassSizes._best`."""
        return _best_within(jobs, offering, learned, self._times_of(menu, len(jobs)))

    def _times_of(self, menu: BatchMenu, requests: int) -> PassTimes:
        if requests not in self._times:
            self._times[requests] = PassTimes(menu, requests)
        return self._times[requests]


def _best_within(jobs: Sequence[Job], offering: Offering, learned: Experience, times: PassTimes) -> _Priced:
    """Return the best sizes of those that offer."""
    # A pass that has trees anyway, of fixed sizes, costs what it costs.
    fixed = [sizing.sizes for job in jobs if isinstance(sizing := job.state.drafter.sizing, FixedSizes)]
    rows = sum(sizes.tree_rows - 1 for sizes in fixed)
    pseudo_rows = sum(sum(sizes.pseudo_rows) for sizes in fixed)
    given = times.relative(rows, pseudo_rows)
    drafted = sum(offer.drafted for _, offer, _ in offering)

    # Tokens of all requests in the time of a plain pass.
    rate = max(1.0, learned.rate) * len(jobs)

    def priced(verify: bool, price: float = 1.0, least: int = 0) -> _Priced:
        row, pseudo_row = rate * price * times.row, rate * price * times.pseudo_row
        found = _chosen(offering, learned.draft_value, row, pseudo_row, verify=verify, least=least)
        # What those of fixed sizes cost is not theirs.
        time = times.relative(rows + found.rows, pseudo_rows + found.pseudo_rows) - given + 1.0
        return replace(found, time=time, worth=found.worth - rate * (time - 1.0))

    plain = _Priced(**vars(Choice.plain(offering)))
    root, tree = priced(verify=False), priced(verify=True)
    if drafted:
        learned.learn_worth((max(tree.worth, root.worth, 0.0) - max(root.worth, 0.0)) / drafted)

    def affordable(choice: _Priced) -> bool:
        return learned.affords(choice.time, drafted > 0, choice.pseudo_rows > 0)

    dearer = (priced(verify=True, price=price) for price in PRICES[1:])
    tree = next((one for one in (tree, *dearer) if affordable(one)), plain)
    best = max((plain, *(one for one in (root, tree) if affordable(one))), key=lambda one: one.worth)
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
    return best


def _chosen(
    offering: Offering, draft_value: float, row_price: float, pseudo_price: float, *, verify: bool, least: int
) -> _Priced:
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
    rows = sum(one.tree_rows - 1 for one in sizes)
    return _Priced(sizes, promises, rows=rows, pseudo_rows=sum(sum(one.pseudo_rows) for one in sizes), worth=worth)
