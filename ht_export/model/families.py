"""The one place that knows which families of base models are supported, and how they differ.

All of them are decoders of `transformers` whose layers take position embeddings and call an attention function; those
layers are used as they are. What a family does around its layers is an entry here (docs/families.md says how to add
one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from runtime.errors import InputError

# Cosines and sines [B, R, Dr] of rotary position embedding, Dr at most D.
PositionEmbeddings = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Family:
    """A family's work before its first layer and after its last one, as names of fields of its configuration."""

    title: str
    # A factor of the embeddings, where the embedding itself does not apply it.
    embedding_factor: str | None = None
    # A factor of the logits, and what they are divided by.
    logit_factor: str | None = None
    logit_divisor: str | None = None
    # Logits l become c tanh(l / c).
    logit_softcap: str | None = None


FAMILIES = {
    "llama": Family("Llama 2, Llama 3, SmolLM2 and others of their architecture"),
    "mistral": Family("Mistral"),
    "ministral": Family("Ministral"),
    "qwen2": Family("Qwen2, Qwen2.5"),
    "qwen3": Family("Qwen3"),
    "smollm3": Family("SmolLM3"),
    "phi3": Family("Phi-3, Phi-3.5, Phi-4"),
    "gemma": Family("Gemma"),
    "gemma2": Family("Gemma 2", logit_softcap="final_logit_softcapping"),
    "gemma3_text": Family("Gemma 3 (text)", logit_softcap="final_logit_softcapping"),
    "olmo": Family("OLMo"),
    "olmo2": Family("OLMo 2"),
    "olmo3": Family("OLMo 3"),
    "granite": Family("Granite", embedding_factor="embedding_multiplier", logit_divisor="logits_scaling"),
    "stablelm": Family("StableLM"),
    "starcoder2": Family("StarCoder2"),
    "cohere": Family("Command R", logit_factor="logit_scale"),
    "cohere2": Family("Command R7B, Command A", logit_factor="logit_scale"),
    "glm4": Family("GLM-4"),
    "exaone4": Family("EXAONE 4"),
    "ernie4_5": Family("ERNIE 4.5"),
    "seed_oss": Family("Seed-OSS"),
    "helium": Family("Helium"),
    "arcee": Family("Arcee"),
    "apertus": Family("Apertus"),
}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
# Fields of configurations that tell other kinds of models, which there is no graph for.
OTHER_KINDS = {
    "a mixture of experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "a multimodal model": ("vision_config", "audio_config", "speech_config"),
    "a state-space or recurrent model": ("state_size", "ssm_state_size", "mamba_d_state", "time_mix_extra_dim",
                                         "conv_kernel", "linear_conv_kernel_dim", "lru_width"),
    "an encoder with a decoder": ("num_decoder_layers", "decoder_layers"),
}  # fmt: skip


class HeadRows(nn.Module):
    """The rows of a model's head for some of its `tokens` [V_d]: normed states [..., d] to their logits [..., V_d],
    which are those that the whole head has for them. It has weights [V_d, d] of its own.
    """

    def __init__(self, head: nn.Linear, tokens: Tensor, factor: float) -> None:
        super().__init__()
        self.tokens: Tensor
        self.register_buffer("tokens", tokens, persistent=False)
        self.weight = nn.Parameter(head.weight[tokens], requires_grad=False)
        self.bias = None if head.bias is None else nn.Parameter(head.bias[tokens], requires_grad=False)
        self.factor = factor

    def forward(self, normed: Tensor) -> Tensor:
        """Return the logits."""
        return _scaled(nn.functional.linear(normed, self.weight, self.bias), self.factor)


@dataclass(frozen=True)
class DecoderParts:
    """The base model's own modules, in the order a row passes through them, and what its family does around them.

    `head` is affine: normed states [..., d] to logits [..., V]. The base model's own logits are `capped` ones; drafts
    are read by the head alone, or by the rows of it that `head_of` gives for some tokens, so that what is added to
    their states adds to their logits.
    """

    embed: Callable[[Tensor], Tensor]
    rotary: Callable[[Tensor, Tensor], list[PositionEmbeddings]]
    layers: nn.ModuleList
    norm: nn.Module
    head: Callable[[Tensor], Tensor]
    head_of: Callable[[Tensor], HeadRows]
    softcap: float | None

    def capped(self, logits: Tensor) -> Tensor:
        """Return the base model's logits for what its head gives."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def head_dim(config: PretrainedConfig) -> int:
    """Return D, the size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_supported(config: PretrainedConfig, source: str) -> None:
    """Raise `InputError`, naming what is not supported, unless `config` is of a family that we export."""
    if config.model_type not in FAMILIES:
        named = ", ".join(getattr(config, "architectures", None) or [])
        kind = next((kind for kind, fields in OTHER_KINDS.items() if any(_has(config, field) for field in fields)), "")
        raise InputError(
            f"{source} is of the architecture {config.model_type!r}{f' ({named})' if named else ''}, "
            f"{f'{kind}, ' if kind else ''}which is not supported; supported: {', '.join(FAMILIES)}"
        )
    for rope_type in {rope.get("rope_type", "default") for rope in _rope_parameters(config)}:
        if rope_type not in ROPE_TYPES:
            raise InputError(
                f"{source} uses RoPE scaling of type {rope_type!r}, which is not supported; "
                f"supported: {', '.join(ROPE_TYPES)}"
            )
    if getattr(config, "use_bidirectional_attention", False):
        raise InputError(f"{source} attends to later tokens too (use_bidirectional_attention): it writes no text")


def decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Return the parts of a supported causal language model."""
    config, decoder = model.config, model.model
    family = FAMILIES[config.model_type]
    embedding_factor = _number(config, family.embedding_factor)
    logit_factor = (_number(config, family.logit_factor) or 1.0) / (_number(config, family.logit_divisor) or 1.0)

    def embed(ids: Tensor) -> Tensor:
        hidden = decoder.embed_tokens(ids)
        return hidden if embedding_factor is None else hidden * embedding_factor

    return DecoderParts(
        embed=embed,
        rotary=lambda hidden, positions: _position_embeddings(model, hidden, positions),
        layers=decoder.layers,
        norm=decoder.norm,
        head=lambda normed: _scaled(model.get_output_embeddings()(normed), logit_factor),
        head_of=lambda tokens: HeadRows(model.get_output_embeddings(), tokens, logit_factor),
        softcap=_number(config, family.logit_softcap),
    )


def context_limit(config: PretrainedConfig, source: str, wanted: int | None) -> int:
    """Return how many tokens prompt and answer may have together: `wanted`, or what the model was made for.

    Frequencies that change with the length of a text (dynamic and longrope scaling) are those of one length here, as
    keys of the cache cannot be rotated again: up to the original length those of short texts, beyond it, with longrope
    only, those of long ones. Raises `InputError` when `wanted` is more than the model can have.
    """
    most, usual = config.max_position_embeddings, config.max_position_embeddings
    for rope in _rope_parameters(config):
        if rope.get("rope_type") == "longrope":
            usual = min(usual, rope["original_max_position_embeddings"])
    if wanted is None:
        return usual
    if not 1 <= wanted <= most:
        raise InputError(f"--max-context {wanted}: {source} has contexts of 1 to {most} tokens")
    return wanted


def fix_frequencies(model: PreTrainedModel, context: int) -> None:
    """Keep the rotary frequencies from changing with the length of a text: they stay those for `context` tokens."""
    config, rotary = model.config, model.model.rotary_emb
    for layer_type, rope in _rope_by_layer_type(config):
        if rope.get("rope_type") == "longrope" and context > rope["original_max_position_embeddings"]:
            options = {} if layer_type is None else {"layer_type": layer_type}
            frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](config, None, seq_len=context, **options)
            prefix = "" if layer_type is None else f"{layer_type}_"
            getattr(rotary, f"{prefix}inv_freq").copy_(frequencies)
    # With another type the module would compute them anew.
    kinds = rotary.rope_type
    rotary.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"


def _position_embeddings(model: PreTrainedModel, hidden: Tensor, positions: Tensor) -> list[PositionEmbeddings]:
    """Return cosines and sines for each layer; layers of one kind share them."""
    rotary, count = model.model.rotary_emb, len(model.model.layers)
    if not isinstance(rotary.rope_type, dict):
        return [rotary(hidden, positions)] * count
    of_kind = {kind: rotary(hidden, positions, kind) for kind in sorted(rotary.rope_type)}
    return [of_kind[kind] for kind in model.config.layer_types]


def _rope_parameters(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    return (rope for _, rope in _rope_by_layer_type(config))


def _rope_by_layer_type(config: PretrainedConfig) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Yield the rotary embedding's parameters, for each kind of layer where kinds have their own."""
    ropes: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = set(getattr(config, "layer_types", None) or ())
    if ropes and ropes.keys() <= kinds:
        yield from ((kind, rope) for kind, rope in ropes.items() if rope)
    else:
        yield None, ropes


def _scaled(logits: Tensor, factor: float) -> Tensor:
    return logits if factor == 1.0 else logits * factor


def _number(config: PretrainedConfig, field: str | None) -> float | None:
    return None if field is None else getattr(config, field)


def _has(config: PretrainedConfig, field: str) -> bool:
    return bool(getattr(config, field, None))
