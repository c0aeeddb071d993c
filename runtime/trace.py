"""A trace of passes: what each pass of one request verified, what of it was accepted, and who had proposed it.

It is kept where a request asks for it. Where none does, nothing here is called.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from runtime.tree import Tree

# Who proposed, beside draft sources, the tokens that a grammar forces.
GRAMMAR = "grammar"
# The proposals of draft sources for one tree, each with the name of its source.
Proposals = Sequence[tuple[str, Tree]]


@dataclass(frozen=True)
class PassNode:
    """A node of a tree that was verified: its `token`, and its `parent` by its place in the tree, -1 for the root.

    `probability` is that of its path as the drafter estimated it, 1.0 for the root. `sources` names the draft sources
    that proposed it, "grammar" where that forced it, none for the root.
    """

    token: int
    parent: int
    probability: float
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass:
    """One pass of a request: a part of its prompt, or a tree that was verified.

    `nodes` are the tree's, its root, the token that was certain before, first; a pass of the prompt has none.
    `accepted` are the nodes on the path that the base model confirmed, the root first, and `tokens` those that the pass
    made certain: the tokens of the accepted nodes after the root, then the one that the base model chose at the last
    of them. A pass of the prompt has one token, or none before the prompt's end. `texts` has for each token what it
    added to the answer's text: all of them joined are that text.

    `rows` counts its tree rows, and `pseudo_rows` the pseudo rows of each draft step. `seconds` went by from when the
    rows were wanted to when their outputs were there, the rows of other requests in the same pass included.
    """

    prompt: bool
    nodes: tuple[PassNode, ...]
    accepted: tuple[int, ...]
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    rows: int
    pseudo_rows: tuple[int, ...]
    seconds: float


class Trace:
    """The passes of one request under way."""

    def __init__(self) -> None:
        self._untaken: list[Pass] = []
        self._begun = self._seconds = 0.0

    def begins(self) -> None:
        """Take note that rows are wanted."""
        self._begun = time.perf_counter()

    def ends(self) -> None:
        """Take note that their outputs are there."""
        self._seconds = time.perf_counter() - self._begun

    def prompted(self, rows: int, pseudo_rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Take the last pass, which was of the prompt and made `tokens` certain."""
        self._add(Pass(True, (), (), tuple(tokens), (), rows, tuple(pseudo_rows), self._seconds))

    def verified(
        self,
        tree: Tree,
        proposals: Proposals,
        pseudo_rows: Sequence[int],
        accepted: Sequence[int],
        tokens: Sequence[int],
        forced: Collection[int] = (),
    ) -> None:
        """Take the last pass, which verified `tree`, made of `proposals` and of nodes that a grammar has `forced`, and
        made `tokens` certain.
        """
        sources = sources_of(tree, proposals, forced)
        nodes = zip(tree.tokens.tolist(), tree.parents.tolist(), tree.probabilities.tolist(), sources, strict=True)
        self._add(
            Pass(
                False,
                tuple(PassNode(*node) for node in nodes),
                tuple(accepted),
                tuple(tokens),
                (),
                len(tree),
                tuple(pseudo_rows),
                self._seconds,
            )
        )

    def take(self) -> list[Pass]:
        """Return the passes since the last call."""
        found, self._untaken = self._untaken, []
        return found

    def _add(self, one: Pass) -> None:
        self._untaken.append(one)


def sources_of(tree: Tree, proposals: Proposals, forced: Collection[int] = ()) -> list[tuple[str, ...]]:
    """Return for each node of `tree` but the root the names of those that proposed it: whose tree has the same tokens
    from the root down to it; and of a grammar for the nodes `forced`, of which those beyond the tree were cut off.
    """
    found: list[tuple[str, ...]] = [() for _ in range(len(tree))]
    for name, proposed in proposals:
        children = {(parent, token): node for node, (parent, token) in enumerate(_edges(proposed), start=1)}
        # For each node of `tree` the same one of the proposal.
        same: list[int | None] = [0]
        for node, (parent, token) in enumerate(_edges(tree), start=1):
            above = same[parent]
            same.append(None if above is None else children.get((above, token)))
            if same[node] is not None and name not in found[node]:
                found[node] = (*found[node], name)
    return [(*names, GRAMMAR) if node in forced else names for node, names in enumerate(found)]


def _edges(tree: Tree) -> Iterable[tuple[int, int]]:
    """Return the parent and the token of each node after the root."""
    return zip(tree.parents[1:].tolist(), tree.tokens[1:].tolist(), strict=True)
