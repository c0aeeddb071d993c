"""Texts that decode together without an engine: it is simulated which drafts are right, and how long a pass takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.decode import DecodingState
from runtime.drafting.best_first import likely_ends
from runtime.drafting.drafter import Drafter, Offer
from runtime.drafting.sizing import AdaptiveSizes
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.scheduling.job import Job
from runtime.scheduling.pass_sizes import PassSizes
from runtime.scheduling.slots import MANY
from runtime.tree import Tree, TreeSizes, chain
from tests.runtime.drafting.test_sizing import Text, menu_of


@dataclass
class Decoded:
    """What became of it: time is in plain passes, `chosen` are the sizes of each request in each pass."""

    tokens: int
    time: float
    chosen: list[list[TreeSizes]]
    offers: int

    def rate(self, requests: int) -> float:
        """Tokens of one request in the time of a plain pass."""
        return self.tokens / self.time / requests


def decode_together(
    choice: PassSizes,
    texts: Sequence[Text],
    time_of: Callable[[Sequence[TreeSizes], int, int], float],
    steps: int = 400,
) -> Decoded:
    """Decode so many steps of `texts` in sizes by `choice`; `time_of` these, rows beyond the roots and pseudo rows."""
    jobs = [
        Job(DecodingState([1], Drafter(AdaptiveSizes(menu_of(0.03, 0.013)), [TransferDrafts()]), 8, (0, 1, 2)), MANY)
        for _ in texts
    ]
    position, drafted = [0] * len(texts), [3] * len(texts)
    result = Decoded(0, 0.0, [], 0)
    for _ in range(steps):
        choice.prepare(jobs)
        trees: list[Tree] = []
        for index, (job, text) in enumerate(zip(jobs, texts, strict=True)):
            drafter = job.state.drafter
            if drafter.rests:
                drafted[index] = 0
                tree = chain([0])
            else:
                result.offers += 1
                tree = text.tree(position[index] % text.tokens, drafted[index], drafter.sizing.most_rows)
            trees.append(tree)
            job.offer = Offer(tree, 128, drafted[index] > 0)
        sizes = choice.choose(jobs)
        gained, rows, pseudo_rows = [], 0, 0
        for index, (job, text) in enumerate(zip(jobs, texts, strict=True)):
            tree = trees[index].first(sizes[job].tree_rows)
            rows += len(tree) - 1
            node = accepted = 0
            at = position[index] % text.tokens
            while accepted < drafted[index] and (child := tree.child(node, text.right[at][accepted])) is not None:
                node, accepted = child, accepted + 1
            job.state.drafter.accept([0] * (accepted + 1))
            gained.append(accepted + 1)
            position[index] += accepted + 1
            ends = likely_ends(tree, sizes[job].pseudo_rows)
            pseudo_rows += sum(map(len, ends))
            drafted[index] = next((k for k, nodes in enumerate(ends) if node not in nodes), len(ends))
            job.offer = None
        choice.learn(gained)
        result.tokens += sum(gained)
        result.time += time_of([sizes[job] for job in jobs], rows, pseudo_rows)
        result.chosen.append([sizes[job] for job in jobs])
    return result
