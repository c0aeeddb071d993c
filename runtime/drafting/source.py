"""Draft sources: whatever can guess how a text goes on.

A source proposes candidates for what follows the certain token, as a tree with probabilities, and is told what became
certain. Guesses cost time and never change the text, so a source may be anything: transfer layers, the text itself,
a text known beforehand. `runtime.drafting.drafter` merges the proposals of any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from runtime.drafting.drafts import DraftStep
from runtime.tree import Tree


@dataclass(frozen=True)
class Context:
    """Where a tree is to grow: from the certain `token`, after `length` cached ones, to at most `max_rows` nodes.

    `drafted` are the drafts that the pass before made of what follows `token`, step 1 first; none if it made none.
    Nodes less probable than `least` are never worth their time.
    """

    token: int
    length: int
    max_rows: int
    drafted: Sequence[DraftStep] = field(default=())
    least: float = 0.0


class DraftSource(Protocol):
    """Guesses how a text goes on. Its `name` says in traces who proposed what."""

    @property
    def name(self) -> str:
        """What it is called, such as "text"."""
        ...

    def shortlist(self, max_rows: int) -> int:
        """Return how many of the most probable tokens of each pseudo row are of use for a tree of `max_rows` nodes; 0
        for a source that does not read pseudo rows.
        """
        ...

    def propose(self, context: Context) -> Tree:
        """Return a tree of at most `context.max_rows` nodes with `context.token` at its root, by falling path
        probabilities; the root alone where there is nothing to propose.
        """
        ...

    def accept(self, tokens: Sequence[int]) -> None:
        """Take the tokens that became certain after those taken before, those of the prompt first."""
        ...
