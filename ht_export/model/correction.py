"""The token correction: what the token before a draft says about it, as trained and as tables for the runtime.

The runtime's side, and what it is for, are in `runtime.drafting.correction`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers import PreTrainedModel

from ht_export.model.families import decoder_parts
from ht_export.model.float32 import computing_in_float32
from runtime.drafting.correction import TokenCorrection

CHUNK_TOKENS = 4096


class CorrectionNetwork(nn.Module):
    """Turns the embedding of a token into a vector that is added to the normed state of the draft after it.

    Two layers of width 2 d lead to `rank` numbers, scaled for each draft step, from which the vector is made. It begins
    as zero.
    """

    def __init__(self, num_steps: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.inner = nn.Linear(hidden_size, 2 * hidden_size)
        self.context = nn.Linear(2 * hidden_size, rank)
        self.scales = nn.Parameter(torch.ones(num_steps, rank))
        self.candidates = nn.Linear(rank, hidden_size, bias=False)
        nn.init.zeros_(self.candidates.weight)

    def contexts(self, embeddings: Tensor) -> Tensor:
        """Return [..., r] for embeddings [..., d]."""
        normed = rms_norm(embeddings.to(torch.float32), embeddings.shape[-1:], eps=1e-5)
        return self.context(silu(self.inner(normed)))

    def forward(self, step: int, embeddings: Tensor) -> Tensor:
        """Return the vectors [..., d] to add at `step` (0-based) after tokens with these embeddings [..., d]."""
        return self.candidates(self.contexts(embeddings) * self.scales[step])


@torch.no_grad()
def correction_tables(
    base: PreTrainedModel, network: CorrectionNetwork, draft_tokens: Tensor | None = None
) -> TokenCorrection:
    """Return the tables that give the runtime what `network` adds to each logit.

    Candidates have a row for every token, as the drafts that the runtime corrects know tokens alone: with
    `draft_tokens` [V_d] those that are never drafted have zeros.
    """
    parts = decoder_parts(base)
    ids = torch.arange(base.config.vocab_size, device=base.device)
    with computing_in_float32(base, base.dtype):
        contexts = torch.cat([network.contexts(parts.embed(chunk)) for chunk in ids.split(CHUNK_TOKENS)])
        # [r, d] through the head, so that this holds for any head; less what it gives for nothing, its biases.
        head = parts.head if draft_tokens is None else parts.head_of(draft_tokens).to(torch.float32)
        vectors = network.candidates.weight.T.to(torch.float32)
        candidates = (head(vectors) - head(torch.zeros_like(vectors[:1]))).T
    # A softmax does not see what all candidates have in common. Without it, tokens off the shortlist need none.
    candidates = candidates - candidates.mean(0)
    if draft_tokens is not None:
        drafted = candidates
        candidates = drafted.new_zeros(len(ids), drafted.shape[1])
        candidates[draft_tokens] = drafted
    return TokenCorrection(candidates.cpu().numpy(), contexts.cpu().numpy(), network.scales.detach().cpu().numpy())
