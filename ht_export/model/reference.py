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
        self._alive = position_ids.shape[1]
        # By window, None for none: the tree mask within it, and the first row of the cache that each row sees, [B, R].
        self._masks: dict[int | None, tuple[Tensor, Tensor | None]] = {None: (tree_mask, None)}
        # The same of the rows that are alive.
        self._seen: dict[int | None, tuple[Tensor, Tensor | None]] = {}

    def begin(self, alive: int) -> None:
        """Have only the first `alive` rows from the next layer on."""
        self._alive = alive
        self._seen = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention) -> Tensor:
        """See `AttentionRows.attend`."""
        self.key_new.append(key)
        self.value_new.append(value)
        cache = self.key_cache[layer], self.value_cache[layer], self.cache_length
        return self.attention(query, key, value, *cache, *self.visible(how), how)

    def visible(self, how: LayerAttention) -> tuple[Tensor, Tensor | None]:
        """Return what the rows see in a layer that attends so: the tree mask [B, R_l, R_l], and where it has a window
        the first visible row [B, R_l] of the cache.
        """
        if (seen := self._seen.get(how.window)) is None:
            mask, first = self._mask(how.window)
            alive = self._alive
            seen = mask[:, :alive, :alive], None if first is None else first[:, :alive]
            self._seen[how.window] = seen
        return seen

    def _mask(self, window: int | None) -> tuple[Tensor, Tensor | None]:
        if window is not None and window not in self._masks:
            positions = self.position_ids
            near = positions[:, :, None] - positions[:, None, :] < window
            # A row of the cache lies at its position.
            self._masks[window] = self.tree_mask & near, positions - (window - 1)
        return self._masks[window]


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
        # What layers of one kind share is cut to the rows that are alive once, until others join.
        shared: dict[int, tuple[Tensor, Tensor]] = {}
        for index, layer in enumerate(parts.layers):
            if index == 0 or self.transfer.joining(index):
                hidden = self._join(hidden, index, pseudo_parents)
                alive = hidden.shape[1]
                rows.begin(alive)
                shared.clear()
            cos, sin = position_embeddings[index]
            if id(cos) not in shared:
                shared[id(cos)] = cos[:, :alive], sin[:, :alive]
            hidden = layer(hidden, position_embeddings=shared[id(cos)], attention_mask=rows)
        hidden = self._join(hidden, len(parts.layers), pseudo_parents)
        wanted, pseudo = gather_rows(hidden, logit_rows), hidden[:, tree_size:]
        if self.draft_head is not None:
            normed = normed_drafts(self.base, self.transfer, pseudo)
            logits, draft_logits = parts.head(parts.norm(wanted)), self.draft_head(normed)
        else:
            if self.transfer.behind_norm:
                both = parts.head(torch.cat([parts.norm(wanted), pseudo], dim=1))
            else:
                both = parts.head(parts.norm(torch.cat([wanted, pseudo], dim=1)))
            logits, draft_logits = both[:, : wanted.shape[1]], both[:, wanted.shape[1] :]
        return ForwardOutput(parts.capped(logits), draft_logits, rows.key_new, rows.value_new)

    def _join(self, hidden: Tensor, layer: int, pseudo_parents: Sequence[Tensor]) -> Tensor:
        joining = [
            self.transfer(k, read_states(self.base, self.transfer, gather_rows(hidden, pseudo_parents[k])))
            for k in self.transfer.joining(layer)
        ]
        return torch.cat([hidden, *joining], dim=1) if joining else hidden


def draft_head(base: PreTrainedModel, transfer: TransferLayers) -> HeadRows | None:
    """Return the head that drafts are read by, None where that is the base model's."""
    return None if transfer.draft_tokens is None else decoder_parts(base).head_of(transfer.draft_tokens)


def read_states(base: PreTrainedModel, transfer: TransferLayers, states: Tensor) -> Tensor:
    """Return what drafts are made of for states [..., d], inputs of a transfer layer or the last layer's output."""
    return decoder_parts(base).norm(states) if transfer.behind_norm else states


def normed_drafts(base: PreTrainedModel, transfer: TransferLayers, drafts: Tensor) -> Tensor:
    """Return what a head reads of `drafts` [..., d], pseudo rows as they are after the last layer."""
    return drafts if transfer.behind_norm else decoder_parts(base).norm(drafts)


def gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Return rows [B, N] of hidden [B, R, d] as [B, N, d]."""
    return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
