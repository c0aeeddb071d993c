"""The tree to verify next: the proposals of all draft sources merged, as large as it pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.arrays import IntArray
from runtime.drafting.best_first import likely_ends, merge
from runtime.drafting.drafts import DraftStep
from runtime.drafting.grammar_drafts import SPARE, GrammarDrafts
from runtime.drafting.sizing import Sizing
from runtime.drafting.source import Context, DraftSource
from runtime.trace import Proposals
from runtime.tree import Tree, TreeSizes, root_alone


@dataclass(frozen=True)
class Offer:
    """The largest `tree` that a text may verify next, best-first, behind `length` cached tokens. `drafted` says whether
    the pass before made drafts for it; `proposals` are what the tree was merged of, and the nodes `forced` are those
    that a grammar forces.
    """

    tree: Tree
    length: int
    drafted: bool
    proposals: Proposals = ()
    forced: frozenset[int] = frozenset()


class Drafter:
    """Builds the trees of one text: what `sources` propose, merged, of the size that `sizing` chooses, or whoever runs
    it together with other texts.

    The `shortlist` most probable tokens of each pseudo row are of use to them, and `draft_steps` draft steps; draft
    logits are of the `draft_tokens` [V_d], of all tokens where that is None. Where a
    later source and those before it disagree, the surer one has the more weight: their order matters little. Trees stay
    within the `grammar`, if there is one. While it `rests` nothing is proposed.
    """

    def __init__(
        self,
        sizing: Sizing,
        sources: Sequence[DraftSource],
        draft_tokens: IntArray | None = None,
        grammar: GrammarDrafts | None = None,
    ) -> None:
        self.sizing = sizing
        self.sources = tuple(sources)
        self.draft_tokens = draft_tokens
        self.grammar = grammar
        self._asked_rows = sizing.most_rows * (1 if grammar is None else SPARE)
        self.shortlist = max((source.shortlist(self._asked_rows) for source in self.sources), default=0)
        # Pseudo rows that nobody reads are not worth their time.
        self.draft_steps = sizing.draft_steps if self.shortlist else 0
        self.rests = False
        # Plain decoding asks nobody what may follow, so nobody is told what does.
        self._most_rows = sizing.most_rows
        self._verifies_nothing = self._most_rows == 1
        # What became certain and no source was told of yet.
        self._untold: list[int] = []

    def begin(self, tokens: Sequence[int]) -> None:
        """Take certain tokens that nobody tried to guess: those of the prompt, and the first one after it."""
        if self._verifies_nothing:
            return
        for source in self.sources:
            source.accept(tokens)

    def offer(self, token: int, drafted: Sequence[DraftStep], length: int) -> Offer:
        """Return the largest tree to verify, `token` at its root.

        `drafted` are the drafts of what follows `token`, none if the pass before made none for it; `length` counts the
        cached tokens before it.
        """
        if self.rests:
            return Offer(root_alone(token), length, drafted=False)
        if self._verifies_nothing:
            return Offer(root_alone(token), length, bool(drafted))
        self.catch_up()
        context = Context(token, length, self._asked_rows, drafted, self.sizing.least)
        proposals = [(source.name, source.propose(context)) for source in self.sources]
        tree = merge(token, (proposed for _, proposed in proposals), context.max_rows)
        forced: frozenset[int] = frozenset()
        if self.grammar is not None:
            tree, forced = self.grammar.shape(tree, self._most_rows)
        return Offer(tree, length, bool(drafted), proposals, forced)

    def cut(self, offer: Offer, sizes: TreeSizes) -> tuple[Tree, tuple[IntArray, ...]]:
        """Return the tree of these sizes, and the nodes that get pseudo rows, by draft step."""
        tree = offer.tree.first(sizes.tree_rows)
        pseudo_rows = sizes.pseudo_rows if self.shortlist and not self.rests else (0,) * len(sizes.pseudo_rows)
        return tree, likely_ends(tree, pseudo_rows)

    def propose(self, token: int, drafted: Sequence[DraftStep], length: int) -> tuple[Tree, tuple[IntArray, ...]]:
        """Return what `cut` makes of an offer, of the sizes that the text chooses by itself."""
        offer = self.offer(token, drafted, length)
        return self.cut(offer, self.sizing.choose(offer.tree, length, offer.drafted))

    def catch_up(self) -> None:
        """Tell the sources what became certain while it rested."""
        if self._untold:
            untold, self._untold = self._untold, []
            self.begin(untold)

    def accept(self, tokens: Sequence[int]) -> None:
        """Take the tokens that a step made certain: the accepted candidates, and the one chosen after them."""
        if self.rests:
            self._untold += tokens
            return
        self.sizing.learn(len(tokens) - 1)
        if self._verifies_nothing:
            return
        if self.grammar is not None:
            self.grammar.accept(tokens)
        for source in self.sources:
            source.accept(tokens)
