"""The tree to verify next: the proposals of all draft sources merged, as large as it pays."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.arrays import IntArray
from runtime.drafting.best_first import likely_ends, merge
from runtime.drafting.drafts import DraftStep
from runtime.drafting.sizing import Sizing
from runtime.drafting.source import Context, DraftSource
from runtime.tree import Tree


class Drafter:
    """Builds the trees of one text: what `sources` propose, merged, of the size that `sizing` chooses.

    The `shortlist` most probable tokens of each pseudo row are of use to them, and `draft_steps` draft steps. Where a
    later source and those before it disagree, the surer one has the more weight: their order matters little.
    """

    def __init__(self, sizing: Sizing, sources: Sequence[DraftSource]) -> None:
        self.sizing = sizing
        self.sources = tuple(sources)
        self.shortlist = max((source.shortlist(sizing.most_rows) for source in self.sources), default=0)
        # Pseudo rows that nobody reads are not worth their time.
        self.draft_steps = sizing.draft_steps if self.shortlist else 0

    def begin(self, tokens: Sequence[int]) -> None:
        """Take the tokens of the prompt, and the first one after it."""
        for source in self.sources:
            source.accept(tokens)

    def propose(self, token: int, drafted: Sequence[DraftStep], length: int) -> tuple[Tree, tuple[IntArray, ...]]:
        """Return the tree to verify, `token` at its root, and the nodes that get pseudo rows, by draft step.

        `drafted` are the drafts of what follows `token`, none if the pass before made none for it; `length` counts the
        cached tokens before it.
        """
        context = Context(token, length, self.sizing.most_rows, drafted)
        tree = merge(token, (source.propose(context) for source in self.sources), context.max_rows)
        sizes = self.sizing.choose(tree, length, bool(drafted))
        tree = tree.first(sizes.tree_rows)
        return tree, likely_ends(tree, sizes.pseudo_rows if self.shortlist else (0,) * len(sizes.pseudo_rows))

    def accept(self, tokens: Sequence[int]) -> None:
        """Take the tokens that a step made certain: the accepted candidates, and the one chosen after them."""
        self.sizing.learn(len(tokens) - 1)
        for source in self.sources:
            source.accept(tokens)
