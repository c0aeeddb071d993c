from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ht_export.export import ExportSettings, export
from ht_export.model.checkpoint import load_base_model
from ht_export.model.transfer import TransferFile, TransferLayers, save_transfer_layers

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large enough that its tokens depend on their context.
    "initializer_range": 0.3,
}
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-families", action="store_true", help="build plans of every tiny model, not of a few")


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Return a small random Llama."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval().requires_grad_(False)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte, so that characters span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {character: index for index, character in enumerate(alphabet, start=len(vocab))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_checkpoint(folder: Path, model: LlamaForCausalLM, **options: object) -> Path:
    """Write `model` with the byte tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


def random_transfer(
    layers: tuple[int, ...], hidden_size: int = 32, seed: int = 1, correction_rank: int = 0
) -> TransferLayers:
    """Return transfer layers away from the identity, so that a swapped step or a lost bias shows."""
    generator = torch.Generator().manual_seed(seed)
    transfer = TransferLayers(layers, hidden_size, correction_rank).requires_grad_(False)
    if transfer.correction is not None:
        for parameter in transfer.correction.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    for linear in transfer.maps:
        linear.weight += 0.2 * torch.randn(linear.weight.shape, generator=generator)
        linear.bias += 0.2 * torch.randn(linear.bias.shape, generator=generator)
    return transfer


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama."""
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), tiny_llama())


@pytest.fixture(scope="session")
def tiny_transfer(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A transfer-layers file for the tiny Llama: three steps, two joining at one layer, out of order."""
    path = tmp_path_factory.mktemp("transfer") / "tiny.safetensors"
    base = load_base_model(str(tiny_checkpoint))
    save_transfer_layers(path, random_transfer((3, 1, 3), correction_rank=4), TransferFile(base.identity()))
    return path


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_transfer: Path) -> Path:
    """The tiny Llama as an engine."""
    out = tmp_path_factory.mktemp("engine") / "engine.onnx"
    settings = ExportSettings(tree_rows=6, pseudo_rows=(6, 4, 2), chunk=16)
    export(str(tiny_checkpoint), tiny_transfer, out, settings, lambda _: nullcontext(lambda _: None))
    return out


@pytest.fixture(scope="session")
def half_engine(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_transfer: Path) -> Path:
    """The tiny Llama as an engine in half precision."""
    out = tmp_path_factory.mktemp("half") / "engine.onnx"
    settings = ExportSettings(tree_rows=6, pseudo_rows=(6, 4, 2), chunk=16, precision="fp16")
    export(str(tiny_checkpoint), tiny_transfer, out, settings, lambda _: nullcontext(lambda _: None))
    return out
