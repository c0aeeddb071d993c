"""The fixed dimensions of a base model with transfer layers, as its graph and its engines have them."""

from __future__ import annotations

from typing import cast

from transformers import PretrainedConfig

from ht_export.model.families import head_dim
from ht_export.model.transfer import TransferLayers
from runtime.bindings import Dtype, GraphDims


def graph_dims(config: PretrainedConfig, transfer: TransferLayers, dtype: str = "float32") -> GraphDims:
    """Return the fixed dimensions of the graph of a base model with transfer layers, in the precision `dtype`."""
    return GraphDims(
        num_layers=config.num_hidden_layers,
        query_heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        transfer_layers=transfer.layers,
        dtype=cast(Dtype, dtype),
        draft_size=transfer.draft_size or None,
    )
