"""The PyTorch reference: base model and transfer rows in one forward, made of the base model's own layers.

Rows are T tree tokens, then the pseudo rows of each step in the order of `TransferLayers.join_order`. All parity
checks compare with this module, and the exporter traces it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ht_export.model.attention import AttentionRows, LayerAttention, tree_attention, use_attention_rows
from ht_export.model.families import HeadRows, decoder_parts
from ht_export.model.transfer import TransferLayers

TreeAttention = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, LayerAttention], Tensor
]


class TreeRows(AttentionRows):
    """Rows that see the valid prefix of the cache and, under the tree mask, each other. Keeps new keys and values."""

    def __init__(
        self,
        key_cache: Sequence[Tensor],
        value_cache: Sequence[Tensor],
        cache_length: Tensor,
        tree_mask: Tensor,
        position_ids: Tensor,
        attention: TreeAttention,
    ) -> None:
        self.key_cache = key_cache
        self.value_cache = value_cache
        self.cache_length = cache_length
        self.tree_mask = tree_mask
        self.position_ids = position_ids
        self.attention = attention
        self.key_new: list[Tensor] = []
        self.value_new: list[Tensor] = []
        # By window: the tree mask within it, and the first row of the cache that each row sees, [B, R].
        self._windows: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention) -> Tensor:
        """See `AttentionRows.attend`."""
        rows = query.shape[2]
        self.key_new.append(key)
        self.value_new.append(value)
        tree_mask, first_visible = self.tree_mask, None
        if how.window is not None:
            tree_mask, first = self._window(how.window)
            first_visible = first[:, :rows]
        return self.attention(
            query,
            key,
            value,
            self.key_cache[layer],
            self.value_cache[layer],
            self.cache_length,
            tree_mask[:, :rows, :rows],
            first_visible,
            how,
        )

    def _window(self, window: int) -> tuple[Tensor, Tensor]:
        if window not in self._windows:
            positions = self.position_ids
            near = positions[:, :, None] - positions[:, None, :] < window
            # A row of the cache lies at its position.
            self._windows[window] = self.tree_mask & near, positions - (window - 1)
        return self._windows[window]


@dataclass(frozen=True)
class ForwardOutput:
    """logits [B, M, V]; draft_logits [B, sum R_k, V_d] in row order, without the family's cap; key_new, value_new of
    each layer [B, Hkv, R_l, D].
    """

    logits: Tensor
    draft_logits: Tensor
    key_new: list[Tensor]
    value_new: list[Tensor]


class HiddenTransferModel(nn.Module):
    """A frozen base model with transfer rows. The exporter puts a symbolic operator in the place of `attention`."""

    def __init__(
        self, base: PreTrainedModel, transfer: TransferLayers, attention: TreeAttention = tree_attention
    ) -> None:
        super().__init__()
        transfer.check_layers(base.config.num_hidden_layers)
        use_attention_rows(base)
        self.base = base
        self.transfer = transfer
        self.attention = attention
        # Weights of its own, that the graph reads beside those of the whole head.
        self.draft_head = draft_head(base, transfer)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        tree_mask: Tensor,
        pseudo_parents: Sequence[Tensor],
        logit_rows: Tensor,
        cache_length: Tensor,
        key_cache: Sequence[Tensor],
        value_cache: Sequence[Tensor],
    ) -> ForwardOutput:
        """Run all rows once.

        input_ids [B, T]; position_ids [B, R]; tree_mask bool [B, R, R]; pseudo_parents K tensors [B, R_k], by step;
        logit_rows [B, M]; cache_length [B]; key_cache, value_cache L tensors [B, Hkv, S, D]. R = T + sum R_k.
        """
        parts = decoder_parts(self.base)
        tree_size = input_ids.shape[1]
        hidden = parts.embed(input_ids)
        position_embeddings = parts.rotary(hidden, position_ids)
        rows = TreeRows(key_cache, value_cache, cache_length, tree_mask, position_ids, self.attention)
        for index, layer in enumerate(parts.layers):
            hidden = self._join(hidden, index, pseudo_parents)
            alive = hidden.shape[1]
            cos, sin = position_embeddings[index]
            hidden = layer(
                hidden,
                position_embeddings=(cos[:, :alive], sin[:, :alive]),
                attention_mask=rows,
            )
        hidden = self._join(hidden, len(parts.layers), pseudo_parents)
        wanted, pseudo = gather_rows(hidden, logit_rows), hidden[:, tree_size:]
        if self.draft_head is not None:
            logits, draft_logits = parts.head(parts.norm(wanted)), self.draft_head(parts.norm(pseudo))
        else:
            both = parts.head(parts.norm(torch.cat([wanted, pseudo], dim=1)))
            logits, draft_logits = both[:, : wanted.shape[1]], both[:, wanted.shape[1] :]
        return ForwardOutput(parts.capped(logits), draft_logits, rows.key_new, rows.value_new)

    def _join(self, hidden: Tensor, layer: int, pseudo_parents: Sequence[Tensor]) -> Tensor:
        joining = [self.transfer(k, gather_rows(hidden, pseudo_parents[k])) for k in self.transfer.joining(layer)]
        return torch.cat([hidden, *joining], dim=1) if joining else hidden


def draft_head(base: PreTrainedModel, transfer: TransferLayers) -> HeadRows | None:
    """Return the head that drafts are read by, None where that is the base model's."""
    return None if transfer.draft_tokens is None else decoder_parts(base).head_of(transfer.draft_tokens)


def gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Return rows [B, N] of hidden [B, R, d] as [B, N, d]."""
    return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
