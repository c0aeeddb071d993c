"""What all ways to choose the sizes of a pass of several requests have in common: who offers, and what was learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.drafting.drafter import Offer
from runtime.drafting.sizing import AdaptiveSizes, BatchMenu
from runtime.engines.protocol import Batch
from runtime.scheduling.experience import Experience
from runtime.scheduling.job import Job
from runtime.tree import TreeSizes

# Of the drafts of each depth, about the most that are accepted where transfer layers are at their best.
BEST = 0.75

# The jobs that have an offer, and no sizes of their own.
Offering = Sequence[tuple[Job, Offer, AdaptiveSizes]]


@dataclass(frozen=True)
class Choice:
    """Sizes of each request that offers, what they promise each in drafted tokens, and the time of the pass in plain
    ones.
    """

    sizes: Sequence[TreeSizes]
    promised: Sequence[float]
    time: float = 1.0

    @classmethod
    def plain(cls, offering: Offering) -> Choice:
        """Return that of plain decoding."""
        sizes = [TreeSizes.plain(len(sizing.menu.sizes[0].pseudo_rows)) for _, _, sizing in offering]
        return cls(sizes, [0.0] * len(offering))


class PassSizes(ABC):
    """Chooses the sizes of passes of several requests, by what was measured of so many (`menus`)."""

    def __init__(self, menus: Sequence[BatchMenu]) -> None:
        self._menus = sorted(menus, key=lambda menu: menu.requests)
        self._experience: dict[int, Experience] = {}
        # That of the pass chosen last, and its time in plain passes.
        self._last: tuple[Experience, float] | None = None

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Let the drafts of these jobs, which decode together, rest or not: before any of them makes an offer."""
        menu = self._menu(len(jobs))
        rests = menu is not None and (self._beyond(len(jobs)) or self._learned(menu, jobs).rests)
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
        menu = self._menu(len(jobs))
        if not offering or menu is None:
            return {}
        learned = self._learned(menu, jobs)
        if self._beyond(len(jobs)) or all(job.state.drafter.rests for job, _, _ in offering):
            learned.idle += 1
            found = Choice.plain(offering)
        else:
            found = self._best(jobs, offering, menu, learned)
        self._last = (learned, found.time)
        for (_, _, sizing), promised in zip(offering, found.promised, strict=True):
            sizing.chosen(promised, found.time)
        return {job: sizes for (job, _, _), sizes in zip(offering, found.sizes, strict=True)}

    def learn(self, tokens: Sequence[int]) -> None:
        """Take note of how many tokens the pass chosen last made certain for each request."""
        if self._last is not None and tokens:
            learned, time = self._last
            learned.learn(sum(tokens) / len(tokens), time)

    @abstractmethod
    def took(self, batch: Batch, seconds: float) -> None:
        """Take note of how long the pass of `batch` took, the one chosen last."""

    @abstractmethod
    def _best(self, jobs: Sequence[Job], offering: Offering, menu: BatchMenu, learned: Experience) -> Choice:
        """Return the best sizes for those of the `jobs` that offer, and take note of what drafts have been worth."""

    def _menu(self, requests: int) -> BatchMenu | None:
        """Return what was measured of so many requests, or of the next larger number: rows are dearer the more requests
        there are. None for one request, and where nothing was measured.
        """
        if requests < 2 or not self._menus:
            return None
        return next((menu for menu in self._menus if menu.requests >= requests), self._menus[-1])

    def _beyond(self, requests: int) -> bool:
        """Return whether there are far more requests than were ever measured: then none of them speculates."""
        return requests > 2 * self._menus[-1].requests

    def _learned(self, menu: BatchMenu, jobs: Sequence[Job]) -> Experience:
        if menu.requests not in self._experience:
            self._experience[menu.requests] = Experience.of(job.state.drafter.sizing for job in jobs)
        return self._experience[menu.requests]
