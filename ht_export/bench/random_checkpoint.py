"""`ht-bench random-checkpoint`: random weights in the shape of a real model, to try exports of any size with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from runtime.checks import whole
from runtime.program import pathname

SHARD_BYTES = 2 << 30
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
        "head_dim": 64, "tie_word_embeddings": True,
    },
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ht-bench random-checkpoint`."""
    parser.description = (
        "Write a checkpoint of random weights in the shape of a real model, shard by shard: to try exports of any size "
        "with. It needs little memory and as much disk as the weights take. Its text means nothing; parity holds for "
        "it as for any."
    )
    parser.epilog = "example: ht-bench random-checkpoint FOLDER --shape llama-2-7b"
    parser.set_defaults(work=write, interrupted="interrupted; the folder is not complete")
    parser.add_argument("folder", type=pathname, help="folder to write, as one of Hugging Face")
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True, help="the model whose shape it has")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help="of the weights (default: bfloat16)")


def write(options: argparse.Namespace) -> int:
    """Write the checkpoint; return the exit status."""
    dtype = getattr(torch, options.dtype)
    shape = dict(SHAPES[options.shape])
    if options.layers is not None:
        shape["num_hidden_layers"] = whole("--layers", options.layers, 1, shape["num_hidden_layers"])
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, **special)
    options.folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    write_weights(model, options.folder, dtype)
    config.architectures, config.dtype = [type(model).__name__], options.dtype
    config.save_pretrained(options.folder)
    byte_tokenizer().save_pretrained(options.folder)
    return 0


def write_weights(model: torch.nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Write random numbers for every parameter, and the index of the shards."""
    shards: list[list[tuple[str, torch.Size]]] = [[]]
    size = 0
    for name, parameter in model.named_parameters():
        size += parameter.numel() * dtype.itemsize
        if shards[-1] and size > SHARD_BYTES:
            shards.append([])
            size = parameter.numel() * dtype.itemsize
        shards[-1].append((name, parameter.shape))
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, shard in enumerate(track(shards, "writing shards"), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in shard:
            # Norms have ones.
            tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            tensors[name] = tensor.to(dtype)
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte."""
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
