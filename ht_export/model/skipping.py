"""A base model that runs without some of its blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ht_export.model.blocks import KINDS, Blocks
from ht_export.model.families import decoder_parts

# The modules of a layer, in every family.
MODULES = {"attention": "self_attn", "mlp": "mlp"}


def all_blocks(num_layers: int) -> list[tuple[str, int]]:
    """Return kind and layer of every block of a model."""
    return [(kind, layer) for layer in range(num_layers) for kind in KINDS]


def block_weights(base: PreTrainedModel) -> dict[tuple[str, int], int]:
    """Return the number of weights of each block."""
    layers = decoder_parts(base).layers
    return {
        (kind, index): sum(parameter.numel() for parameter in getattr(layer, MODULES[kind]).parameters())
        for index, layer in enumerate(layers)
        for kind in KINDS
    }


@contextlib.contextmanager
def without(base: PreTrainedModel, blocks: Blocks) -> Iterator[None]:
    """Have `base` run without these blocks in this block of code."""
    layers = decoder_parts(base).layers
    put_back = []
    try:
        for kind in KINDS:
            for layer in getattr(blocks, kind):
                put_back.append((layers[layer], MODULES[kind], getattr(layers[layer], MODULES[kind])))
                setattr(layers[layer], MODULES[kind], _Nothing(several=kind == "attention"))
        yield
    finally:
        for layer, name, module in put_back:
            setattr(layer, name, module)


class _Nothing(nn.Module):
    """Adds nothing to the stream; attention returns its weights too."""

    def __init__(self, *, several: bool) -> None:
        super().__init__()
        self.several = several

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor | tuple[Tensor, None]:
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.several else nothing
