"""What a checkpoint states about its model: numbers that a model can have, and no more than its weight files hold.

They are checked twice: as they stand in `config.json` or a GGUF header, before any other code makes lists, modules or
tensors of them, and as the configuration that `transformers` makes of them, with its defaults for what is not stated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from msgspec import UNSET, Meta, UnsetType
from transformers import PretrainedConfig

from runtime.errors import InputError
from runtime.formats import JsonFormat

FETCH_AGAIN = "it may be damaged or incomplete: fetch it again"

# Each limit is far above any model's.
Width = Annotated[int, Meta(ge=1, le=1 << 16)]
InnerWidth = Annotated[int, Meta(ge=1, le=1 << 20)]
Layers = Annotated[int, Meta(ge=1, le=1 << 12)]
Heads = Annotated[int, Meta(ge=1, le=1 << 12)]
HeadWidth = Annotated[int, Meta(ge=1, le=1 << 13)]
Vocabulary = Annotated[int, Meta(ge=1, le=1 << 24)]
Positions = Annotated[int, Meta(ge=1, le=1 << 27)]
# Some write 0 for none.
Window = Annotated[int, Meta(ge=0, le=1 << 27)]
Labels = Annotated[int, Meta(ge=0, le=1 << 20)]
# Some write -1 for none.
Token = Annotated[int, Meta(ge=-1, lt=1 << 31)]
Tokens = Token | list[Token] | None
Epsilon = Annotated[float, Meta(ge=0, le=1)]
Base = Annotated[float, Meta(gt=0, le=1e15)]
Factor = Annotated[float, Meta(gt=0, le=1e9)]
Share = Annotated[float, Meta(gt=0, le=1)]
Number = Annotated[float, Meta(ge=-1e30, le=1e30)]
# Errors repeat them.
Name = Annotated[str, Meta(max_length=100)]
# A file of the folder itself.
WeightsFile = Annotated[str, Meta(pattern=r"\A[^/\\\0]+\.safetensors\Z")]
WeightsOrIndex = Annotated[str, Meta(pattern=r"\A[^/\\\0]+\.safetensors(\.index\.json)?\Z")]
# Another name would be that of a repository whose code is fetched.
Implementation = Annotated[str, Meta(pattern=r"\A[^/:]*\Z")]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary embedding, of the whole model or, by kind of layer, of each."""

    rope_type: Name | None = None
    type: Name | None = None
    rope_theta: Base | None = None
    factor: Factor | None = None
    partial_rotary_factor: Share | None = None
    original_max_position_embeddings: Positions | None = None
    attention_factor: Factor | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    beta_fast: Number | None = None
    beta_slow: Number | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    short_factor: list[Factor] | None = None
    long_factor: list[Factor] | None = None
    full_attention: Rope | None = None
    sliding_attention: Rope | None = None


@dataclass(frozen=True, kw_only=True)
class Stated:
    """The fields of a configuration that we rely on, or that others make something of; names are those of
    `config.json`.
    """

    hidden_size: Width | UnsetType = UNSET
    intermediate_size: InnerWidth | UnsetType = UNSET
    num_hidden_layers: Layers | UnsetType = UNSET
    num_attention_heads: Heads | UnsetType = UNSET
    num_key_value_heads: Heads | None = None
    head_dim: HeadWidth | None = None
    vocab_size: Vocabulary | UnsetType = UNSET
    max_position_embeddings: Positions | UnsetType = UNSET
    original_max_position_embeddings: Positions | None = None
    sliding_window: Window | None = None
    sliding_window_pattern: Layers | None = None
    max_window_layers: Annotated[int, Meta(ge=0, le=1 << 12)] | None = None
    no_rope_layer_interval: Layers | None = None
    layer_types: list[str] | None = None
    rms_norm_eps: Epsilon | UnsetType = UNSET
    layer_norm_eps: Epsilon | UnsetType = UNSET
    norm_eps: Epsilon | UnsetType = UNSET
    norm_epsilon: Epsilon | UnsetType = UNSET
    rope_theta: Base | None = None
    rope_local_base_freq: Base | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    partial_rotary_factor: Share | None = None
    embedding_multiplier: Factor | None = None
    attention_multiplier: Factor | None = None
    residual_multiplier: Number | None = None
    logits_scaling: Factor | None = None
    logit_scale: Factor | None = None
    query_pre_attn_scalar: Factor | None = None
    attn_logit_softcapping: Factor | None = None
    final_logit_softcapping: Factor | None = None
    clip_qkv: Factor | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: Tokens = None
    eos_token_id: Tokens = None
    pad_token_id: Tokens = None
    num_labels: Labels | None = None
    transformers_weights: WeightsOrIndex | None = None
    attn_implementation: Implementation | None = None
    experts_implementation: Implementation | None = None

    def __post_init__(self) -> None:
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if isinstance(heads, int) and shared is not None and heads % shared:
            raise ValueError(f"num_key_value_heads is {shared}, and must divide num_attention_heads, {heads}")
        width = self.hidden_size
        if isinstance(heads, int) and isinstance(width, int) and self.head_dim is None and width % heads:
            raise ValueError(
                f"num_attention_heads is {heads}, and must divide hidden_size, {width}, without a head_dim"
            )


@dataclass(frozen=True)
class Kind:
    """The kind of model that `config.json` is of; the rest is looked at where it is one that is supported."""

    model_type: Name
    architectures: Annotated[list[Name], Meta(max_length=16)] | None = None


@dataclass(frozen=True, kw_only=True)
class Decoder(Stated):
    """A whole configuration of a supported family, in which the sizes are none that one may leave out."""

    hidden_size: Width = field()
    intermediate_size: InnerWidth = field()
    num_hidden_layers: Layers = field()
    num_attention_heads: Heads = field()
    vocab_size: Vocabulary = field()
    max_position_embeddings: Positions = field()

    @property
    def least_parameters(self) -> int:
        """The parameters of the embeddings and of the matrices that layers have in every family."""
        heads = self.num_attention_heads * (self.head_dim or self.hidden_size // self.num_attention_heads)
        return self.hidden_size * (self.vocab_size + 2 * self.num_hidden_layers * (heads + self.intermediate_size))


@dataclass(frozen=True, kw_only=True)
class GenerationFile:
    """What `generation_config.json` states, as far as we rely on it."""

    eos_token_id: Tokens = None
    bos_token_id: Tokens = None
    pad_token_id: Tokens = None


@dataclass(frozen=True)
class WeightsIndex:
    """The file that each weight is in."""

    weight_map: Annotated[dict[str, WeightsFile], Meta(min_length=1)]


@dataclass(frozen=True)
class StoredWeights:
    """The number of `parameters` that weight files hold, in so many `tensors`."""

    parameters: int
    tensors: int


CONFIG = JsonFormat("model configuration", 1 << 24, FETCH_AGAIN, kind=dict[str, Any])
GENERATION = JsonFormat("configuration of generation", 1 << 24, FETCH_AGAIN, kind=GenerationFile)
INDEX = JsonFormat("index of weight files", 1 << 26, FETCH_AGAIN, kind=WeightsIndex)

# Parameters that a stored value can hold where a checkpoint is quantised: others pack one or two bits.
MOST_PACKED = 16
# Otherwise that many are let pass: what is missing is told by name where it is looked for.
SLACK = 2


def check_config(config: PretrainedConfig, source: str) -> Decoder:
    """Return what `config` states. Raises `InputError`, naming field, value and what is allowed."""
    return CONFIG.fit(dict(_attributes(config)), Decoder, source)


def check_stored(decoder: Decoder, stored: StoredWeights, source: str, *, packed: bool = False) -> None:
    """Raise `InputError` unless the weight files, `packed` or not, can hold a model as `decoder` states it.

    Without that a file of a few bytes could ask for all memory: what a model lacks is made before it is missed.
    """
    most = stored.parameters * (MOST_PACKED if packed else SLACK)
    if decoder.least_parameters > most or decoder.num_hidden_layers > stored.tensors:
        raise InputError(
            f"{source} states {decoder.num_hidden_layers} layers of hidden_size {decoder.hidden_size}, "
            f"intermediate_size {decoder.intermediate_size} and {decoder.num_attention_heads} heads with a vocab_size "
            f"of {decoder.vocab_size}, {decoder.least_parameters} parameters at least, and its weight files hold "
            f"{stored.parameters} in {stored.tensors} tensors; {FETCH_AGAIN}"
        )


def _attributes(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    for one in fields(Decoder):
        value = getattr(config, one.name, UNSET)
        if value is not UNSET:
            yield one.name, value
