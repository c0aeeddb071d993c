"""Attention of rows in the base model's own layers: a `transformers` attention function that asks the rows themselves.

The layers of the base model stay as they are. They call the attention function registered here, and what the rows of
this forward may see is decided by the `AttentionRows` object that the layers get in the place of an attention mask,
which all of them pass on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "ht_rows"


@dataclass(frozen=True)
class LayerAttention:
    """The attention of a layer: scores times `scale`; with a `softcap` c, scores s become c tanh(s / c); with a
    `window` W, a row sees positions less than W before its own, itself included.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class AttentionRows(ABC):
    """The rows of one forward, and what they see, layer by layer."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention) -> Tensor:
        """Return the attention output [B, Hq, R, D] for query [B, Hq, R, D] and new key, value [B, Hkv, R, D]."""


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, how: LayerAttention) -> Tensor:
    """Return the attention output [B, Hq, R, D] of query [B, Hq, R, D] over key, value [B, Hkv, N, D].

    visible bool [B, 1, R, N] has all that a row sees, the layer's window included.
    """
    if how.softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=how.scale, enable_gqa=True)
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, dim=1).transpose(2, 3) * how.scale
    scores = torch.tanh(scores / how.softcap) * how.softcap
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights @ value.repeat_interleave(group, dim=1)


def tree_attention(
    query: Tensor,
    key_new: Tensor,
    value_new: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_length: Tensor,
    tree_mask: Tensor,
    first_visible: Tensor | None,
    how: LayerAttention,
) -> Tensor:
    """Attend to the valid prefix of the cache and, under `tree_mask`, to the new rows.

    Shapes and meaning as in `plugins.reference.tree_attention`; what a window hides is told by `tree_mask` and
    `first_visible`, not by `how`.
    """
    batch, _, rows, _ = query.shape
    capacity = key_cache.shape[2]
    slots = torch.arange(capacity, device=query.device)
    cached = (slots < cache_length[:, None])[:, None, :].expand(batch, rows, capacity)
    if first_visible is not None:
        cached = cached & (slots >= first_visible[..., None])
    visible = torch.cat([cached, tree_mask], dim=-1)
    keys, values = torch.cat([key_cache, key_new], dim=2), torch.cat([value_cache, value_new], dim=2)
    return attention(query, keys, values, visible[:, None], how)


def use_attention_rows(model: PreTrainedModel) -> None:
    """Let the layers of `model` take `AttentionRows` as `attention_mask`; with another they attend as ever."""
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
    attention_mask: Tensor | AttentionRows | None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    how = LayerAttention(scaling, sliding_window, softcap)
    if isinstance(attention_mask, AttentionRows):
        return attention_mask.attend(module.layer_idx, query, key, value, how).transpose(1, 2), None
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if attention_mask is None:
        rows, columns = query.shape[2], key.shape[2]
        positions = torch.arange(columns, device=query.device)
        attention_mask = (positions <= positions[columns - rows :, None])[None, None]
    return attention(query, key, value, attention_mask, how).transpose(1, 2), None
