"""KL of the drafts to the base model's distribution, and its gradient, with one chunk of logits in memory at a time.

A vocabulary-sized row for each draft would dwarf everything else in training. The gradient of a row's KL with respect
to its logits is known in closed form, softmax(draft) - softmax(base), so each chunk goes through the LM head, back, and
is forgotten.

**With a draft head** the sum over tokens that is KL is over its tokens alone: with m the base model's probability of
all of them together, the loss of a row is m KL(base, renormalised || draft), its gradient m softmax(draft) - base. The
weight m keeps drafts calibrated. Over all rows that look alike to the draft, the minimum is the mean of base divided by
the mean of m: a draft is surer than the base model by the share of such text that the head covers, and no more. Without
the weight, rows whose token is outside would count in full, for what little is left of their distribution: drafts would
learn to be sure where nothing that they can say is right.

The mass m takes the base model's whole head, for one number a row: the log of its softmax's sum. Where that number is
known from before (`log_normalisers`), the head runs over the draft tokens alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ht_export.model.families import DecoderParts, HeadRows
from runtime.errors import InputError

CHUNK_ROWS = 64


@dataclass(frozen=True)
class Objective:
    """The distributions that drafts are pulled towards.

    `weights` [K] weigh the steps; both distributions are softened by `temperature`; with `top_k` above 0 only the base
    model's k most probable tokens count, renormalised. Its own choice, the most probable token, has the share `choice`
    of what drafts are pulled towards, the distribution the rest: of greedy decoding only the choice matters.
    """

    weights: tuple[float, ...]
    temperature: float = 1.0
    top_k: int = 0
    choice: float = 0.0

    def __post_init__(self) -> None:
        if not self.weights:
            raise InputError("at least one draft step is needed")
        if not all(0 <= weight < math.inf for weight in self.weights) or sum(self.weights) == 0:
            raise InputError(f"step weights must be at least 0 and not all 0, not {self.weights}")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"the loss's temperature must be above 0, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"the loss's top_k must be at least 0 (0 takes all tokens), not {self.top_k}")
        if not 0 <= self.choice <= 1:
            raise InputError(f"the choice's share of the loss must be from 0 to 1, not {self.choice}")

    @property
    def is_plain(self) -> bool:
        """Whether the base model's distribution is taken as it is, so that `log_normalisers` are its own."""
        return self.temperature == 1 and self.top_k == 0 and self.choice == 0


@dataclass(frozen=True)
class Losses:
    """by_step [K], the mean KL(base || draft) of each step in nats, of a draft head's tokens where there is one, and
    the gradients of their weighted sum.

    As is usual, the sum's gradients are times the temperature squared, so that their size does not depend on it.

    gradient and shift_gradient [N, K, d] are those of the drafts and of the shifts.
    """

    by_step: Tensor
    gradient: Tensor
    shift_gradient: Tensor | None


@torch.no_grad()
def log_normalisers(parts: DecoderParts, states: Tensor) -> Tensor:
    """Return the log of the sum over the vocabulary of the exponentials of the base model's logits, [M] in float32, for
    states [M, d], outputs of the last layer.
    """
    chunks = states.split(CHUNK_ROWS)
    found = [parts.capped(parts.head(parts.norm(chunk))).float().logsumexp(-1) for chunk in chunks]
    return torch.cat(found) if found else states.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def draft_losses(
    parts: DecoderParts,
    drafts: Tensor,
    states: Tensor,
    targets: Tensor,
    objective: Objective,
    shifts: Tensor | None = None,
    draft_head: HeadRows | None = None,
    normalisers: Tensor | None = None,
    behind_norm: bool = False,
) -> Losses:
    """Return the losses of `drafts`.

    drafts [N, K, d] and states [M, d] are outputs of the last layer, of pseudo rows and of the base model's own rows;
    targets [N, K] say which state predicts the token that a draft stands for; shifts [N, K, d] are added to the normed
    drafts, which are read by the `draft_head`, None for the base model's. Drafts made `behind_norm` are read as they
    are. `normalisers` [M] are the states'
    `log_normalisers`, which a draft head and an objective that `is_plain` have use for.
    """
    count, num_steps = targets.shape
    gradient = torch.zeros_like(drafts)
    shift_gradient = None if shifts is None else torch.zeros_like(shifts)
    totals = torch.zeros(num_steps, device=drafts.device)
    scale = objective.temperature / max(1, count)
    read = parts.head if draft_head is None else draft_head
    for start in range(0, count, CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        # Neighbouring anchors share target positions: the base model's head runs once for each.
        positions, index = torch.unique(targets[rows], return_inverse=True)
        normed_states = parts.norm(states[positions])
        if draft_head is not None and normalisers is not None and objective.is_plain:
            logits = parts.capped(draft_head(normed_states)).float()
            wanted, mass, negative_entropy = _of_draft_tokens((logits - normalisers[positions, None]).exp())
        else:
            logits = parts.capped(parts.head(normed_states))
            wanted, mass, negative_entropy = _base_distribution(logits, objective, draft_head)
        for k in range(num_steps):
            leaves = [drafts[rows, k].detach().requires_grad_()]
            with torch.enable_grad():
                normed = leaves[0] if behind_norm else parts.norm(leaves[0])
                if shifts is not None:
                    leaves.append(shifts[rows, k].detach().requires_grad_())
                    normed = normed + leaves[1].to(normed.dtype)
                output = read(normed)
            logits = output.detach().float().div_(objective.temperature)
            normaliser = logits.logsumexp(-1, keepdim=True)
            target, weight = wanted[index[:, k]], mass[index[:, k]]
            cross = weight * normaliser[:, 0] - (target * logits).sum(-1)
            totals[k] += (cross + negative_entropy[index[:, k]]).sum()
            error = logits.sub_(normaliser).exp_().mul_(weight[:, None]).sub_(target)
            error.mul_(objective.weights[k] * scale)
            found = torch.autograd.grad(output, leaves, error.to(output.dtype))
            gradient[rows, k] = found[0]
            if shift_gradient is not None:
                shift_gradient[rows, k] = found[1]
    return Losses(totals / max(1, count), gradient, shift_gradient)


def _base_distribution(
    logits: Tensor, objective: Objective, draft_head: HeadRows | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the base model's probabilities [U, V_d] of what drafts can be, their sum m [U], and what the loss has of
    them alone [U]: m times the negative entropy of that distribution.
    """
    logits = logits.float().div_(objective.temperature)
    if 0 < objective.top_k < logits.shape[-1]:
        least = logits.topk(objective.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if objective.choice:
        chosen = logits.argmax(-1, keepdim=True)
        probabilities.mul_(1 - objective.choice).scatter_add_(
            1, chosen, torch.full_like(logits[:, :1], objective.choice)
        )
    return _of_draft_tokens(probabilities if draft_head is None else probabilities[:, draft_head.tokens])


def _of_draft_tokens(probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_base_distribution` does, of the probabilities [U, V_d] of what drafts can be."""
    mass = probabilities.sum(-1)
    return probabilities, mass, -torch.special.entr(probabilities).sum(-1) - torch.special.xlogy(mass, mass)
