"""How rows of the base model's own layers attend: a `transformers` attention function that asks the rows themselves.

The layers of the base model stay as they are. They call the attention function registered here, and what the rows of
this forward may see is decided by the `AttentionRows` object passed along with them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "ht_rows"


class AttentionRows(Protocol):
    """What one forward's rows see, layer by layer."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the attention output [B, Hq, R, D] for query [B, Hq, R, D] and new key, value [B, Hkv, R, D]."""
        ...


def tree_attention(
    query: Tensor,
    key_new: Tensor,
    value_new: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_length: Tensor,
    tree_mask: Tensor,
    scale: float,
) -> Tensor:
    """Attend to the valid prefix of the cache and, under `tree_mask`, to the new rows.

    Shapes and meaning as in `plugins.reference.tree_attention`.
    """
    batch, _, rows, _ = query.shape
    capacity = key_cache.shape[2]
    valid = torch.arange(capacity, device=query.device) < cache_length[:, None]
    visible = torch.cat([valid[:, None, :].expand(batch, rows, capacity), tree_mask], dim=-1)
    return scaled_dot_product_attention(
        query,
        torch.cat([key_cache, key_new], dim=2),
        torch.cat([value_cache, value_new], dim=2),
        attn_mask=visible[:, None],
        scale=scale,
        enable_gqa=True,
    )


def use_attention_rows(model: PreTrainedModel) -> None:
    """Let the layers of `model` take an `attention_rows=` argument; without it they attend as `sdpa` does."""
    if model.config._attn_implementation == ATTENTION_NAME:
        return
    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    model.set_attn_implementation(ATTENTION_NAME)


def _attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    attention_rows: AttentionRows | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    if attention_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    output = attention_rows.attend(module.layer_idx, query, key, value, scaling)
    return output.transpose(1, 2), None
