"""A tiny random model of every supported family, and of every switch that a family has."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large enough that its tokens depend on their context.
    "initializer_range": 0.3,
}
ALTERNATING = ["sliding_attention", "full_attention"]
ROPE = {"rope_theta": 10000.0}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": 64,
    **ROPE,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, heads of another size": ("llama", {"head_dim": 16}),
    "llama, one head for keys": ("llama", {"num_key_value_heads": 1}),
    "llama, as many heads for keys": ("llama", {"num_key_value_heads": 4}),
    "llama, linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **ROPE}}),
    "llama, dynamic scaling": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **ROPE}}),
    "llama, yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                **ROPE,
            }
        },
    ),
    "llama, llama3 scaling": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                **ROPE,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "ministral, alternating windows": ("ministral", {"sliding_window": 5, "layer_types": ALTERNATING, "head_dim": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows in later layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, alternating windows": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "layer_types": ALTERNATING},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, partial rotary, window": (
        "phi3",
        {"sliding_window": 5, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **ROPE}},
    ),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
            # Low enough that capping shows.
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2, no caps": (
        "gemma2",
        {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "layer_types": ALTERNATING,
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
            },
        },
    ),
    "olmo": ("olmo", {"clip_qkv": 0.5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 5, "layer_types": ALTERNATING}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
        },
    ),
    "stablelm": ("stablelm", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default", **ROPE}}),
    "stablelm, parallel, normed heads": (
        "stablelm",
        {
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "use_qkv_bias": True,
            "rope_parameters": {"partial_rotary_factor": 0.25, "rope_type": "default", **ROPE},
            "hidden_size": 64,
        },
    ),
    "starcoder2": ("starcoder2", {"sliding_window": 5}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "cohere, normed heads": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {"sliding_window": 5, "layer_types": ALTERNATING}),
    "glm4": (
        "glm4",
        {"head_dim": 8, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default", **ROPE}},
    ),
    "exaone4": ("exaone4", {"sliding_window": 5, "layer_types": ALTERNATING}),
    "ernie4_5": ("ernie4_5", {"head_dim": 8}),
    "seed_oss": ("seed_oss", {"head_dim": 16}),
    "helium": ("helium", {"head_dim": 8}),
    "arcee": ("arcee", {}),
    "apertus": ("apertus", {}),
}


def tiny_model(name: str, seed: int = 0, **more: object) -> PreTrainedModel:
    """Return the tiny random model of that name, with `more` in its configuration."""
    model_type, changes = MODELS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**COMMON, **changes, **more})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    # Parameters that begin as ones or zeros would hide that they are left out.
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model
