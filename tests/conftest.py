from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ht_export.transfer import TransferLayers

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Return a random Llama whose weights are large enough for its tokens to depend on its context."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "initializer_range": 0.3, **changes}))
    return model.eval().requires_grad_(False)


def random_transfer(layers: tuple[int, ...], hidden_size: int = 32, seed: int = 1) -> TransferLayers:
    """Return transfer layers away from the identity, so that a swapped step or a lost bias shows."""
    generator = torch.Generator().manual_seed(seed)
    transfer = TransferLayers(layers, hidden_size).requires_grad_(False)
    for linear in transfer.maps:
        linear.weight += 0.2 * torch.randn(linear.weight.shape, generator=generator)
        linear.bias += 0.2 * torch.randn(linear.bias.shape, generator=generator)
    return transfer


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()
