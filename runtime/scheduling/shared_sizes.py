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
from runtime.drafting.sizing import BatchMenu, Menu
from runtime.engines.protocol import Batch
from runtime.scheduling.experience import Experience
from runtime.scheduling.job import Job
from runtime.scheduling.pass_sizes import BEST, Choice, Offering, PassSizes


def _most_tokens(menu: Menu) -> FloatArray:
    """Return [N]: about the most tokens that a step of each size brings where transfer layers are at their best."""
    depths = np.minimum(menu.tree_rows - 1, menu.draft_steps)
    return 1 + np.array([sum(BEST**depth for depth in range(1, int(most) + 1)) for most in depths])


class SharedSizes(PassSizes):
    """Chooses one size for all requests of a pass."""

    def took(self, batch: Batch, seconds: float) -> None:
        """See `PassSizes.took`: times stay what was measured, as a GPU is nobody else's."""

    def _best(self, jobs: Sequence[Job], offering: Offering, menu: BatchMenu, learned: Experience) -> Choice:
        """See `PassSizes._best`."""
        best, promised, time = _best_on(menu.menu, learned, offering)
        return Choice([menu.menu.sizes[best]] * len(offering), promised, time)


def _best_on(menu: Menu, learned: Experience, offering: Offering) -> tuple[int, list[float], float]:
    """Return the number of the best size on the menu, what it promises each request, and its time."""
    count = len(offering)
    seconds = menu.at(sum(offer.length for _, offer, _ in offering) // count)
    time = seconds / seconds[0]
    promised = np.array([menu.promised(offer.tree) for _, offer, _ in offering])
    believed = np.array([sizing.believed for _, _, sizing in offering])
    left = np.array([menu.left_drafted(offer.tree) for _, offer, _ in offering])
    # Shares of one request: a pass takes the same for all of them.
    worth = (believed[:, None] * promised + learned.draft_value * left).mean(axis=0) - max(1.0, learned.rate) * time
    drafted = sum(offer.drafted for _, offer, _ in offering)
    if drafted:
        learned.learn_worth(float(worth.max() - worth[menu.tree_rows == 1].max()))
    affordable = np.array(
        [learned.affords(one, drafted > 0, drafts) for one, drafts in zip(time.tolist(), menu.drafts, strict=True)]
    )
    best = int(np.argmax(np.where(affordable, worth, -np.inf)))
    learned.idle = learned.idle + 1 if best == 0 else 0
    if learned.idle > learned.pause:
        # Other sources are looked at every time. Drafts cost a pass: they are tried where they can pay at all.
        tried = affordable & menu.drafts & bool((_most_tokens(menu) > time).any())
        if tried.any():
            best = int(np.argmax(np.where(tried, worth, -np.inf)))
            learned.idle = 0
        else:
            learned.lengthen_pause()
            learned.idle = 1
    return best, promised[:, best].tolist(), float(time[best])
