"""The one place that knows which base model families are supported, and where their parts are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from runtime.errors import InputError

SUPPORTED_ARCHITECTURES = ("llama",)
# Dynamic and longrope change their frequencies with the length of the text, which a fixed graph cannot follow.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class DecoderParts:
    """The base model's own modules, in the order a row passes through them."""

    embed: nn.Module
    rotary: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Module


def check_supported(config: PretrainedConfig, source: str) -> None:
    """Raise `InputError`, naming what is not supported, unless `config` is of a family that we export."""
    if config.model_type not in SUPPORTED_ARCHITECTURES:
        named = ", ".join(getattr(config, "architectures", None) or [])
        raise InputError(
            f"{source} is of the architecture {config.model_type!r}{f' ({named})' if named else ''}, which is not "
            f"supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise InputError(
            f"{source} uses RoPE scaling of type {rope_type!r}, which is not supported; "
            f"supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
        )


def decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Return the modules of a supported causal language model."""
    decoder = model.model
    return DecoderParts(
        embed=decoder.embed_tokens,
        rotary=decoder.rotary_emb,
        layers=decoder.layers,
        norm=decoder.norm,
        head=model.get_output_embeddings(),
    )
