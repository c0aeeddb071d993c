"""Costs of rows, and the row counts that give the most tokens per time at that cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ht_export.model.checkpoint import BaseModel
from ht_export.model.families import decoder_parts
from ht_export.training.simulate import TextDrafts, tokens_per_step
from runtime.errors import InputError
from runtime.tree import TreeSizes

TREE_ROWS = (2, 4, 8, 16, 32, 64)
PSEUDO_SHARES = (1.0, 0.5)


@dataclass(frozen=True)
class RowCosts:
    """The cost of a pass in units of a plain pass, which has one row.

    Every further tree row adds `row_cost`. A pseudo row adds its share of that: the layers that it passes and the head
    that reads it, by their numbers of parameters.
    """

    row_cost: float
    num_layers: int
    layer_parameters: int
    head_parameters: int
    draft_parameters: int

    @classmethod
    def of(cls, base: BaseModel, row_cost: float, draft_size: int | None = None) -> RowCosts:
        """Return the costs for a base model, with a head for drafts over `draft_size` tokens if that is given. Raises
        `InputError` for a `row_cost` outside 0..1.
        """
        if not 0 <= row_cost <= 1:
            raise InputError(f"the cost of a row must be between 0 and 1 plain passes, not {row_cost}")
        parts = decoder_parts(base.model)
        layer = sum(parameter.numel() for parameter in parts.layers[0].parameters())
        head = sum(parameter.numel() for parameter in base.model.get_output_embeddings().parameters())
        vocab_size = base.model.config.vocab_size
        return cls(row_cost, len(parts.layers), layer, head, head * (draft_size or vocab_size) // vocab_size)

    def pseudo_row(self, layer: int) -> float:
        """Return the share of a whole row that a pseudo row costs which joins at `layer`."""
        passed = (self.num_layers - layer) * self.layer_parameters + self.draft_parameters
        return passed / (self.num_layers * self.layer_parameters + self.head_parameters)

    def of_pass(self, layers: Sequence[int], sizes: TreeSizes) -> float:
        """Return the cost of a decoding pass with these transfer layers and row counts."""
        pseudo = sum(rows * self.pseudo_row(layer) for rows, layer in zip(sizes.pseudo_rows, layers, strict=True))
        return 1 + self.row_cost * (sizes.tree_rows - 1 + pseudo)


@dataclass(frozen=True)
class Choice:
    """Row counts with the tokens per step that they give, their cost, and the quotient: the expected speed-up."""

    sizes: TreeSizes
    tokens_per_step: float
    cost: float

    @property
    def speedup(self) -> float:
        """Tokens per time, in units of plain decoding's."""
        return self.tokens_per_step / self.cost


def best_choice(texts: Sequence[TextDrafts], layers: Sequence[int], costs: RowCosts) -> Choice:
    """Return the fastest choice of row counts for these drafts; plain decoding when none is faster."""
    choices = [Choice(TreeSizes.plain(len(layers)), 1.0, 1.0)]
    for sizes in _candidates(len(layers)):
        choices.append(Choice(sizes, tokens_per_step(texts, sizes), costs.of_pass(layers, sizes)))
    return max(choices, key=lambda choice: choice.speedup)


def _candidates(num_steps: int) -> Iterator[TreeSizes]:
    for tree_rows in TREE_ROWS:
        for share in PSEUDO_SHARES:
            pseudo_rows = math.ceil(tree_rows * share)
            for used in range(1, num_steps + 1):
                yield TreeSizes(tree_rows, (pseudo_rows,) * used + (0,) * (num_steps - used))
