"""What has been learned while so many requests ran together: what drafts are worth, and when to try them again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.drafting.sizing import (
    DRAFT_VALUE,
    DRAFT_VALUE_STEP,
    FIRST_PAUSE,
    MEMORY,
    RATE_PASSES,
    AdaptiveSizes,
    Sizing,
)

# As in `runtime.drafting.sizing`, but less, and longer pauses: where there are many requests a try costs all of them.
FIRST_CREDIT = 1.0
PASS_CREDIT = 0.005
MOST_CREDIT = 3.0
LONGEST_PAUSE = 128


@dataclass
class Experience:
    """`draft_value` tokens are what the drafts of one node add to the step after, beyond their cost. Tokens and time
    are one request's share, time in plain passes; `credit` is what speculation may cost before it brings anything.

    After `idle` passes without drafts, more than the `pause`, they are tried again.
    """

    draft_value: float
    tokens: float = RATE_PASSES
    time: float = RATE_PASSES
    credit: float = FIRST_CREDIT
    pause: int = FIRST_PAUSE
    idle: int = 0

    @classmethod
    def of(cls, sizings: Iterable[Sizing]) -> Experience:
        """Return what to begin with where requests choose by these: what they believe, if any of them does."""
        values = [sizing.draft_value for sizing in sizings if isinstance(sizing, AdaptiveSizes)]
        return cls(sum(values) / len(values) if values else DRAFT_VALUE)

    @property
    def rate(self) -> float:
        """Tokens of a request in the time of a plain pass, lately."""
        return self.tokens / self.time

    @property
    def rests(self) -> bool:
        """Return whether it was chosen to draft nothing, and it is not time to try again."""
        return 0 < self.idle <= self.pause

    def learn_worth(self, gain: float) -> None:
        """Take note of what the drafts of one node have brought a step that had them, in tokens beyond its cost."""
        self.draft_value += DRAFT_VALUE_STEP * (gain - self.draft_value)
        if gain <= 0.0:
            self.lengthen_pause()
        elif self.rate >= 1.0:
            # One step says little where lately all of them together have brought less than plain decoding.
            self.pause = FIRST_PAUSE

    def lengthen_pause(self) -> None:
        """Wait longer before drafts are tried again."""
        self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def affords(self, time: float, drafted: bool, drafts: bool) -> bool:
        """Return whether a pass may take `time` plain passes, where the pass before has `drafted` or not, and this one
        `drafts`: drafts tried again must be able to pay for verifying them.
        """
        risk = 2.0 if drafts and not drafted else 1.0
        return risk * (time - 1.0) <= self.credit

    def learn(self, tokens: float, time: float) -> None:
        """Take note of a pass that brought each request so many tokens, in the time of so many plain ones."""
        self.tokens = MEMORY * self.tokens + tokens
        self.time = MEMORY * self.time + time
        self.credit = min(self.credit + tokens - time + PASS_CREDIT, MOST_CREDIT)
