"""The optimizers of a fit, and what each keeps for a parameter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

OPTIMIZERS = ("adamw", "muon")
# What an optimizer keeps for each parameter: a count, and averages of the parameter's shape.
COUNT = "step"
KEPT: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: (COUNT, "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


def make_optimizers(
    trained: nn.Module, by_muon: Iterable[nn.Module], learning_rate: float
) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers of the parameters of `trained`, each of some of its own: Muon (Keller Jordan 2024) for the
    matrices of the modules `by_muon`, and AdamW for the rest.
    """
    matrices = [p for module in by_muon for p in module.parameters() if p.dim() == 2]
    taken = set(matrices)
    rest = [parameter for parameter in trained.parameters() if parameter not in taken]
    adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    if not matrices:
        return (adamw,)
    # The size of its updates is matched to AdamW's, so that one learning rate serves both.
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return muon, adamw
