"""Drafts for many anchors of a text at once: the base model runs once without gradients, then only pseudo rows run.

An anchor is a position of the text. Its K pseudo rows see the text up to and including the anchor, and the anchor's
own earlier steps, as at run time (`HiddenTransferModel`), so the drafts are the same; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from ht_export.model.attention import AttentionRows, LayerAttention, attention, use_attention_rows
from ht_export.model.families import decoder_parts
from ht_export.model.reference import gather_rows, read_states
from ht_export.model.transfer import TransferLayers


@dataclass
class Context:
    """The part of the base model's run over B texts of N tokens, padded on the right, that pseudo rows need.

    hidden[t] [B, N, d] is the input of layer t, for every transfer layer and for the last layer's output (t = L);
    keys[l], values[l] [B, Hkv, N, D] for every layer that a pseudo row passes. normalisers [B, N], where they were
    kept: `ht_export.training.losses.log_normalisers` of the last layer's output.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    normalisers: Tensor | None = None


class _CausalRows(AttentionRows):
    """Rows of a whole text. Keeps keys and values from `first_layer` on."""

    def __init__(self, context: Context, first_layer: int) -> None:
        self.context = context
        self.first_layer = first_layer

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention) -> Tensor:
        if layer >= self.first_layer:
            self.context.keys[layer] = key
            self.context.values[layer] = value
        if how.window is None and how.softcap is None:
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=how.scale, enable_gqa=True)
        positions = torch.arange(query.shape[2], device=query.device)
        before = positions[:, None] - positions
        visible = (before >= 0) & (before < how.window) if how.window else before >= 0
        return attention(query, key, value, visible[None, None], how)


class _AnchorRows(AttentionRows):
    """Pseudo rows that see the text up to their anchor, themselves, and their anchor's earlier steps."""

    def __init__(self, context: Context, mask: Tensor, length: int, positions: Tensor) -> None:
        self.context = context
        self.mask = mask
        self.length = length
        self.positions = positions

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention) -> Tensor:
        rows = query.shape[2]
        visible = self.mask[:, :rows, : self.length + rows]
        if how.window is not None:
            own = self.positions[:, :rows]
            text = torch.arange(self.length, device=own.device).expand(len(own), -1)
            visible = visible & (own[..., None] - torch.cat([text, own], dim=1)[:, None] < how.window)
        keys = torch.cat([self.context.keys[layer], key], dim=2)
        values = torch.cat([self.context.values[layer], value], dim=2)
        return attention(query, keys, values, visible[:, None], how)


@torch.no_grad()
def run_context(base: PreTrainedModel, layers: Iterable[int], input_ids: Tensor) -> Context:
    """Run the base model over input_ids [B, N], padded on the right, and keep what transfer layers at `layers` read."""
    use_attention_rows(base)
    parts = decoder_parts(base)
    context = Context()
    layers = set(layers)
    rows = _CausalRows(context, min(layers))
    hidden = parts.embed(input_ids)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    position_embeddings = parts.rotary(hidden, positions)
    for index, layer in enumerate(parts.layers):
        if index in layers:
            context.hidden[index] = hidden
        hidden = layer(hidden, position_embeddings=position_embeddings[index], attention_mask=rows)
    context.hidden[len(parts.layers)] = hidden
    return context


def draft_hidden(base: PreTrainedModel, transfer: TransferLayers, context: Context, anchors: Tensor) -> Tensor:
    """Return the last layer's output of every pseudo row, [B, A, K, d], for anchors [B, A] (positions in the text);
    what heads make behind the last norm comes as it is. See `ht_export.model.reference.normed_drafts`.
    """
    use_attention_rows(base)
    parts = decoder_parts(base)
    num_layers = len(parts.layers)
    batch, count = anchors.shape
    length = context.hidden[num_layers].shape[1]
    # [B, K * A], the rows in join order, as in the graph.
    order = torch.tensor(transfer.join_order, device=anchors.device)
    positions = (anchors[:, None, :] + order[None, :, None] + 1).reshape(batch, -1)
    mask = _anchor_mask(anchors, order, length)
    rows = _AnchorRows(context, mask, length, positions)
    dtype = context.hidden[num_layers].dtype
    position_embeddings = parts.rotary(context.hidden[num_layers], positions)
    hidden = context.hidden[num_layers].new_empty(batch, 0, context.hidden[num_layers].shape[-1])
    for index in range(min(transfer.layers), num_layers + 1):
        for step in transfer.joining(index):
            read = read_states(base, transfer, gather_rows(context.hidden[index], anchors))
            joined = transfer(step, read.to(torch.float32))
            hidden = torch.cat([hidden, joined.to(dtype)], dim=1)
        if index < num_layers:
            alive = hidden.shape[1]
            cos, sin = position_embeddings[index]
            hidden = parts.layers[index](
                hidden, position_embeddings=(cos[:, :alive], sin[:, :alive]), attention_mask=rows
            )
    by_row = hidden.reshape(batch, transfer.num_steps, count, -1)
    # Contiguous: the head's matrix product would otherwise run once for each anchor.
    return by_row[:, torch.argsort(order)].transpose(1, 2).contiguous()


def _anchor_mask(anchors: Tensor, order: Tensor, length: int) -> Tensor:
    """Return the bool mask [B, rows, N + rows] of pseudo rows over the text and over each other."""
    batch, count = anchors.shape
    num_steps = len(order)
    text = torch.arange(length, device=anchors.device) <= anchors[..., None]
    earlier = order[None, :] <= order[:, None]
    same_anchor = torch.eye(count, dtype=torch.bool, device=anchors.device)
    siblings = (earlier[:, None, :, None] & same_anchor[None, :, None, :]).reshape(num_steps * count, -1)
    return torch.cat([text.repeat(1, num_steps, 1), siblings.expand(batch, -1, -1)], dim=-1)
