"""Changes to transfer layers and their loss, for `transfer_variants.py`, and what each one trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ht_export.model.checkpoint import BaseModel
from ht_export.model.families import decoder_parts
from ht_export.model.transfer import TransferLayers


@dataclass(frozen=True)
class Variant:
    """What is changed. `steps` draft steps; `weights` of the steps' losses; `hard`, the share of the base model's own
    choice in the target; `acceptance`, from which share of the fit on the loss is the acceptance of LK losses
    (arXiv 2602.23881) instead of KL; `consistency`, the weight of the distance to the real states; `gated`, a
    correction scaled by the pseudo state; `two_before`, one that knows two tokens; `rank` of adapters beside all
    products of the layers passed (with `rank_of` those named so alone); `muon` in place of AdamW for the maps, and
    with `muon_correction` for the matrices of the correction too; the `correction_rank`, 0 for that of the start.
    """

    steps: int = 4
    weights: tuple[float, ...] = ()
    hard: float = 0.0
    acceptance: float = 1.0
    consistency: float = 0.0
    gated: bool = False
    two_before: bool = False
    rank: int = 0
    rank_of: str = ""
    muon: bool = False
    muon_correction: bool = False
    learning_rate: float = 1e-3
    correction_rank: int = 0


VARIANTS = {
    "plain": Variant(),
    "three": Variant(steps=3),
    "five": Variant(steps=5),
    "hard": Variant(hard=0.5),
    "hardest": Variant(hard=1.0),
    "gated": Variant(gated=True),
    "two-before": Variant(two_before=True),
    "both": Variant(gated=True, two_before=True),
    "adapters-8": Variant(rank=8),
    "adapters-16": Variant(rank=16),
    "adapters-32": Variant(rank=32),
    "adapters-down": Variant(rank=32, rank_of="down_proj"),
    "consistent": Variant(consistency=0.5),
    "acceptance": Variant(acceptance=0.5),
    "weighted": Variant(weights=(1.0, 0.8, 0.6, 0.4)),
    "muon": Variant(muon=True),
    "muon-all": Variant(muon=True, muon_correction=True),
    "wide": Variant(muon=True, correction_rank=256),
    "muon-consistent": Variant(muon=True, consistency=0.5),
    "slow": Variant(learning_rate=5e-4),
    "fast": Variant(learning_rate=2e-3),
}


class Trained(nn.Module):
    """A variant's parameters."""

    def __init__(self, variant: Variant, transfer: TransferLayers, base: BaseModel) -> None:
        super().__init__()
        self.variant = variant
        self.transfer = transfer
        assert transfer.correction is not None
        width, rank = transfer.hidden_size, transfer.correction.rank
        self.gate = nn.Linear(width, rank) if variant.gated else None
        self.second = nn.Embedding(base.model.config.vocab_size, rank) if variant.two_before else None
        for zero in (self.gate, self.second):
            if zero is not None:
                for parameter in zero.parameters():
                    nn.init.zeros_(parameter)
        self.adapters = nn.ModuleDict()
        for index, layer in enumerate(decoder_parts(base.model).layers):
            for name, module in layer.named_modules():
                passed = index >= min(transfer.layers) and isinstance(module, nn.Linear)
                if variant.rank and passed and variant.rank_of in name:
                    self.adapters[f"{index}.{name}".replace(".", "-")] = Adapter(module, variant.rank)

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Have the adapters in the base model's layers meanwhile."""
        adapters = [one for one in self.adapters.values() if isinstance(one, Adapter)]
        for adapter in adapters:
            adapter.on = True
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.on = False

    def contexts(self, step: int, embeddings: Tensor, normed: Tensor, second: Tensor) -> Tensor:
        """Return [N, r], what candidates are multiplied by at `step`, for embeddings [N, d] of the tokens before, the
        normed drafts [N, d] and the tokens [N] before those.
        """
        correction = self.transfer.correction
        assert correction is not None
        found = correction.contexts(embeddings) * correction.scales[step]
        if self.gate is not None:
            found = found * (1 + self.gate(normed.float()))
        if self.second is not None:
            found = found + self.second(second)
        return found


class Adapter(nn.Module):
    """A low-rank product beside a linear layer, begun as zero, that adds to its output while it is `on`."""

    def __init__(self, beside: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, beside.in_features) / math.sqrt(beside.in_features))
        self.up = nn.Parameter(torch.zeros(beside.out_features, rank))
        self.on = False
        beside.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.on:
            return None
        down, up = self.down.to(output.dtype), self.up.to(output.dtype)
        return output + linear(linear(inputs[0], down), up)


@dataclass
class Training:
    """A variant under way."""

    name: str
    trained: Trained
    optimizers: tuple[torch.optim.Optimizer, ...]

    def rate(self, done: float, steps: int) -> float:
        """Return the learning rate's share after `done` of the steps."""
        warm = min(1.0, (done * steps + 1) / 20)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
