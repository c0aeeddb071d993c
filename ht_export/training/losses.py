"""KL of the drafts to the base model's distribution, and its gradient, with one chunk of logits in memory at a time.

A vocabulary-sized row for each draft would dwarf everything else in training. The gradient of a row's KL with respect
to its logits is known in closed form, softmax(draft) - softmax(base), so each chunk goes through the LM head, back, and
is forgotten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ht_export.model.families import DecoderParts
from runtime.errors import InputError

CHUNK_ROWS = 64


@dataclass(frozen=True)
class Objective:
    """The distributions that drafts are pulled towards.

    `weights` [K] weigh the steps; both distributions are softened by `temperature`; with `top_k` above 0 only the base
    model's k most probable tokens count, renormalised.
    """

    weights: tuple[float, ...]
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not self.weights:
            raise InputError("at least one draft step is needed")
        if not all(0 <= weight < math.inf for weight in self.weights) or sum(self.weights) == 0:
            raise InputError(f"step weights must be at least 0 and not all 0, not {self.weights}")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"the loss's temperature must be above 0, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"the loss's top_k must be at least 0 (0 takes all tokens), not {self.top_k}")


@dataclass(frozen=True)
class Losses:
    """by_step [K], the mean KL(base || draft) of each step in nats, and the gradients of their weighted sum.

    As is usual, the sum's gradients are times the temperature squared, so that their size does not depend on it.

    gradient and shift_gradient [N, K, d] are those of the drafts and of the shifts.
    """

    by_step: Tensor
    gradient: Tensor
    shift_gradient: Tensor | None


@torch.no_grad()
def draft_losses(
    parts: DecoderParts,
    drafts: Tensor,
    states: Tensor,
    targets: Tensor,
    objective: Objective,
    shifts: Tensor | None = None,
) -> Losses:
    """Return the losses of `drafts`.

    drafts [N, K, d] and states [M, d] are outputs of the last layer, of pseudo rows and of the base model's own rows;
    targets [N, K] say which state predicts the token that a draft stands for; shifts [N, K, d] are added to the normed
    drafts.
    """
    count, num_steps = targets.shape
    gradient = torch.zeros_like(drafts)
    shift_gradient = None if shifts is None else torch.zeros_like(shifts)
    totals = torch.zeros(num_steps, device=drafts.device)
    scale = objective.temperature / max(1, count)
    for start in range(0, count, CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        # Neighbouring anchors share target positions: the base model's head runs once for each.
        positions, index = torch.unique(targets[rows], return_inverse=True)
        wanted, negative_entropy = _base_distribution(
            parts.capped(parts.head(parts.norm(states[positions]))), objective
        )
        for k in range(num_steps):
            leaves = [drafts[rows, k].detach().requires_grad_()]
            with torch.enable_grad():
                normed = parts.norm(leaves[0])
                if shifts is not None:
                    leaves.append(shifts[rows, k].detach().requires_grad_())
                    normed = normed + leaves[1].to(normed.dtype)
                output = parts.head(normed)
            logits = output.detach().float().div_(objective.temperature)
            normaliser = logits.logsumexp(-1, keepdim=True)
            target = wanted[index[:, k]]
            cross = normaliser[:, 0] - (target * logits).sum(-1)
            totals[k] += (cross + negative_entropy[index[:, k]]).sum()
            error = logits.sub_(normaliser).exp_().sub_(target).mul_(objective.weights[k] * scale)
            found = torch.autograd.grad(output, leaves, error.to(output.dtype))
            gradient[rows, k] = found[0]
            if shift_gradient is not None:
                shift_gradient[rows, k] = found[1]
    return Losses(totals / max(1, count), gradient, shift_gradient)


def _base_distribution(logits: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return the distribution [U, V] that drafts are pulled towards, and its negative entropy [U]."""
    logits = logits.float().div_(objective.temperature)
    if 0 < objective.top_k < logits.shape[-1]:
        least = logits.topk(objective.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    return probabilities, -torch.special.entr(probabilities).sum(-1)
