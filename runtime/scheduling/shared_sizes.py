"""One choice of sizes for all requests that decode in one pass.

All of them are brought to one size, so that a row added to the largest tree costs one for every request, and up to
that size the others' are free. So a single size is chosen for all: that whose expected tokens, those of all requests
together, are worth the most beyond its time, as in `runtime.drafting.sizing`. With many requests that is soon the size
of plain decoding; then drafts rest, and are tried again now and then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.arrays import FloatArray
from runtime.drafting.drafter import Offer
from runtime.drafting.sizing import AdaptiveSizes, BatchMenu, Menu
from runtime.engines.protocol import Batch
from runtime.scheduling.experience import Experience
from runtime.scheduling.job import Job
from runtime.tree import TreeSizes

# Of the drafts of each depth, about the most that are accepted where transfer layers are at their best.
BEST = 0.75


def _most_tokens(menu: Menu) -> FloatArray:
    """Return [N]: about the most tokens that a step of each size brings where transfer layers are at their best."""
    depths = np.minimum(menu.tree_rows - 1, menu.draft_steps)
    return 1 + np.array([sum(BEST**depth for depth in range(1, int(most) + 1)) for most in depths])


class SharedSizes:
    """Chooses the sizes of passes of several requests, by the `menus` of so many."""

    def __init__(self, menus: Sequence[BatchMenu]) -> None:
        self._menus = sorted(menus, key=lambda menu: menu.requests)
        self._states: dict[int, Experience] = {}
        # That of the pass chosen last, and its time in plain passes.
        self._last: tuple[Experience, float] | None = None

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Let the drafts of these jobs, which decode together, rest or not: before any of them makes an offer."""
        found = self._menu(len(jobs))
        rests = False
        if found is not None:
            rests = self._state(found, jobs).rests
        for job in jobs:
            if job.offer is None and isinstance(job.state.drafter.sizing, AdaptiveSizes):
                job.state.drafter.rests = rests

    def choose(self, jobs: Sequence[Job]) -> dict[Job, TreeSizes]:
        """Return the sizes of the jobs that have an offer and no sizes of their own; none for a job that is alone."""
        self._last = None
        offering = [
            (job, job.offer, sizing)
            for job in jobs
            if job.offer is not None and isinstance(sizing := job.state.drafter.sizing, AdaptiveSizes)
        ]
        found = self._menu(len(jobs))
        if not offering or found is None:
            return {}
        menu, state = found.menu, self._state(found, jobs)
        if all(job.state.drafter.rests for job, _, _ in offering):
            state.idle += 1
            best, promises, time = 0, [0.0] * len(offering), 1.0
        else:
            best, promises, time = self._best(menu, state, offering)
        self._last = (state, time)
        for (_, _, sizing), promised in zip(offering, promises, strict=True):
            sizing.chosen(promised, time)
        return {job: menu.sizes[best] for job, _, _ in offering}

    def learn(self, tokens: Sequence[int]) -> None:
        """Take note of how many tokens the pass chosen last made certain for each request."""
        if self._last is not None and tokens:
            state, time = self._last
            state.learn(sum(tokens) / len(tokens), time)

    def took(self, batch: Batch, seconds: float) -> None:
        """See `RowBudget.took`: here times stay what was measured, as a GPU is nobody else's."""

    @staticmethod
    def _best(
        menu: Menu, state: Experience, offering: Sequence[tuple[Job, Offer, AdaptiveSizes]]
    ) -> tuple[int, list[float], float]:
        """Return the number of the best size on the menu, what it promises each request, and its time."""
        count = len(offering)
        seconds = menu.at(sum(offer.length for _, offer, _ in offering) // count)
        time = seconds / seconds[0]
        promised = np.array([menu.promised(offer.tree) for _, offer, _ in offering])
        believed = np.array([sizing.believed for _, _, sizing in offering])
        left = np.array([menu.left_drafted(offer.tree) for _, offer, _ in offering])
        # Shares of one request: a pass takes the same for all of them.
        worth = (believed[:, None] * promised + state.draft_value * left).mean(axis=0) - max(1.0, state.rate) * time
        drafted = sum(offer.drafted for _, offer, _ in offering)
        if drafted:
            state.learn_worth(float(worth.max() - worth[menu.tree_rows == 1].max()))
        affordable = np.array(
            [state.affords(one, drafted > 0, drafts) for one, drafts in zip(time.tolist(), menu.drafts, strict=True)]
        )
        best = int(np.argmax(np.where(affordable, worth, -np.inf)))
        state.idle = state.idle + 1 if best == 0 else 0
        if state.idle > state.pause:
            # Other sources are looked at every time. Drafts cost a pass: they are tried where they can pay at all.
            tried = affordable & menu.drafts & bool((_most_tokens(menu) > time).any())
            if tried.any():
                best = int(np.argmax(np.where(tried, worth, -np.inf)))
                state.idle = 0
            else:
                state.lengthen_pause()
                state.idle = 1
        return best, promised[:, best].tolist(), float(time[best])

    def _menu(self, requests: int) -> BatchMenu | None:
        """Return the menu of so many requests, or of the next larger number: rows are dearer the more requests there
        are. None for one request, and where nothing was measured. Beyond twice the largest number that was measured
        it is plain decoding.
        """
        if requests < 2 or not self._menus:
            return None
        largest = self._menus[-1]
        if requests > 2 * largest.requests:
            plain = Menu(largest.menu.sizes[:1], largest.menu.contexts, largest.menu.seconds[:, :1])
            return BatchMenu(requests, plain)
        return next((menu for menu in self._menus if menu.requests >= requests), largest)

    def _state(self, menu: BatchMenu, jobs: Sequence[Job]) -> Experience:
        if menu.requests not in self._states:
            self._states[menu.requests] = Experience.of(job.state.drafter.sizing for job in jobs)
        return self._states[menu.requests]
