"""LoRA adapters from disk, as PEFT writes them, merged into a base model.

A folder has `adapter_config.json` and `adapter_model.safetensors`. Of a matrix W [out, in] there are A [r, in] and
B [out, r], and merged it is W + s B A with s = alpha / r, or alpha / sqrt(r) for rank-stabilised adapters
(arXiv 2106.09685, 2312.03732). Embeddings [V, d] have A [r, V] and B [d, r]. Biases, and whole modules that were
trained, take the place of the base model's.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor, nn
from transformers import PreTrainedModel

from ht_export.model.tensors import opened_tensors, shapes
from runtime.errors import InputError, one_line, shown
from runtime.files import sha256_file
from runtime.formats import Format, JsonFormat

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
SAVE_AGAIN = "save the adapter again with PEFT (save_pretrained)"
CONFIG = JsonFormat("configuration of an adapter", 1 << 22, SAVE_AGAIN, kind=dict[str, Any])
WEIGHTS = Format("safetensors file of an adapter", 1 << 26, SAVE_AGAIN)

Rank = Annotated[int, Meta(ge=1, le=1 << 16)]
Alpha = Annotated[float, Meta(ge=-1e9, le=1e9)]
Pattern = Annotated[str, Meta(max_length=200)]

# What changes the model otherwise than by a product that is added: by the field that tells it, and its name.
OTHERS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA, which is off for a part of the text",
    "layer_replication": "layer replication, which makes another architecture",
    "trainable_token_indices": "trained rows of embeddings",
    "target_parameters": "LoRA of parameters that are no modules",
    "arrow_config": "Arrow routing",
    "ensure_weight_tying": "an adapter that ties weights",
}
# Initialisations that change the base model's weights too, so that the adapter is one of other weights.
OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A regular expression of somebody else's can take forever; names of layers need no more than this.
MOST_REPEATS = 3
REPEATED_GROUP = re.compile(r"\)\s*[*+{]")

_TENSOR = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+?)\.(?:"
    r"lora_(?:embedding_)?(?P<factor>[AB])(?:\.default)?(?:\.(?P<of>weight|bias))?"
    r"|(?:base_layer\.|modules_to_save\.(?:default\.)?|original_module\.)?(?P<whole>weight|bias))$"
)


@dataclass(frozen=True, kw_only=True)
class _Config:
    """What `adapter_config.json` says of a LoRA adapter; ranks are those that its tensors have."""

    r: Rank = 8
    lora_alpha: Alpha = 8
    use_rslora: bool = False
    alpha_pattern: dict[Pattern, Alpha] | None = None
    base_model_name_or_path: str | None = None

    def scale(self, module: str, rank: int) -> float:
        """Return s of the module of that name, whose adapter has that rank."""
        alpha = self.lora_alpha
        for pattern, own in (self.alpha_pattern or {}).items():
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
                alpha = own
                break
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: its name, a SHA-256 of both files, and the base model that it states."""

    folder: Path
    config: _Config
    sha256: str

    def identity(self) -> dict[str, Any]:
        """Return what files made from the merged model record about it."""
        stated = self.config.base_model_name_or_path
        name = self.folder.resolve().name
        return {"name": name, "sha256": self.sha256, "stated_base": None if stated is None else Path(stated).name}


@dataclass
class _Change:
    """What an adapter has for one module: A, B and the bias of B, or whole parameters."""

    a: Tensor | None = None
    b: Tensor | None = None
    b_bias: Tensor | None = None
    whole: dict[str, Tensor] = field(default_factory=dict)


def read_adapter(folder: Path) -> Adapter:
    """Read what the adapter in `folder` is, without its weights. Raises `InputError`, naming what is not supported."""
    config_path, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not config_path.is_file():
        raise InputError(f"no adapter at {folder} ({CONFIG_NAME} is missing); give a folder that PEFT has saved")
    stated = CONFIG.read(config_path)
    kind = stated.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{folder} is an adapter of the type {shown(kind)}, which is not supported; supported: LORA")
    for name, told in OTHERS.items():
        if stated.get(name):
            raise InputError(f"{folder} uses {told} ({name}), which is not supported; merge it with PEFT instead")
    begun = stated.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(OTHER_BASES):
        raise InputError(
            f"{folder} was begun by {shown(begun)}, which changes the base model's weights too; "
            "convert it with PEFT (path_initial_model_for_weight_conversion) and give that"
        )
    config = CONFIG.fit(stated, _Config, config_path)
    for pattern in config.alpha_pattern or {}:
        _check_pattern(pattern, config_path)
    if not weights.is_file():
        pickled = " (adapter_model.bin is a pickle file, which is never read)"
        has = pickled if (folder / "adapter_model.bin").exists() else ""
        raise InputError(f"{folder} has no {WEIGHTS_NAME}{has}; {SAVE_AGAIN}, as safetensors")
    digest = hashlib.sha256(f"{sha256_file(config_path)} {sha256_file(weights)}".encode()).hexdigest()
    return Adapter(folder, config, digest)


def merge(model: PreTrainedModel, adapter: Adapter) -> None:
    """Merge `adapter` into `model`: the matrices that it changes become float32.

    Where the head is the embedding and only one of them is changed, they are two from then on. Raises `InputError`
    where a part of it does not fit, and the model is then not to be used.
    """
    path = adapter.folder / WEIGHTS_NAME
    with opened_tensors(path, WEIGHTS) as file, torch.no_grad():
        for name, change in _changes(file, path).items():
            module = _module(model, name, adapter)
            _apply(model, module, name, change, adapter)


def _changes(file: Any, path: Path) -> dict[str, _Change]:
    """Return what the opened file at `path` has, by module."""
    changes: dict[str, _Change] = {}
    for name in shapes(file):
        if "lora_magnitude_vector" in name:
            raise InputError(f"{path} has {name}: it uses DoRA, which is not supported; merge it with PEFT instead")
        found = _TENSOR.match(name)
        if found is None or (found["of"] == "bias" and found["factor"] == "A"):
            raise InputError(f"{path} has a tensor {one_line(name)}, which is no part of a LoRA adapter; {SAVE_AGAIN}")
        tensor = file.get_tensor(name)
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} has values that are no finite floating-point numbers; {SAVE_AGAIN}")
        change = changes.setdefault(found["module"], _Change())
        tensor = tensor.to(torch.float32)
        if found["whole"]:
            change.whole[found["whole"]] = tensor
        elif found["factor"] == "A":
            change.a = tensor
        elif found["of"] == "bias":
            change.b_bias = tensor
        else:
            change.b = tensor
    if not changes:
        raise InputError(f"{path} has no tensors; {SAVE_AGAIN}")
    return changes


def _module(model: PreTrainedModel, name: str, adapter: Adapter) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        fault = f"it changes {one_line(name)}, which this model ({model.config.model_type}) does not have"
        raise _misfit(adapter, fault) from None


def _apply(model: PreTrainedModel, module: nn.Module, name: str, change: _Change, adapter: Adapter) -> None:
    for parameter, value in change.whole.items():
        present = getattr(module, parameter, None)
        if not isinstance(present, nn.Parameter):
            raise _misfit(adapter, f"it has a {parameter} of {name}, where the model has none")
        _check_shape(adapter, f"{name}.{parameter}", value.shape, present.shape)
        _set(model, f"{name}.{parameter}", value, adapter)
    if change.a is None and change.b is None and change.b_bias is None:
        return
    if change.a is None or change.b is None or change.a.ndim != 2 or change.b.ndim != 2:
        raise _misfit(adapter, f"of {name} it has not both matrices, lora_A and lora_B")
    if not isinstance(module, nn.Linear | nn.Embedding):
        kind = type(module).__name__
        raise _misfit(adapter, f"it changes {name}, a {kind}, which is neither a matrix nor embeddings")
    rank = change.a.shape[0]
    if change.b.shape[1] != rank:
        raise _misfit(adapter, f"the matrices of {name} are of ranks {rank} and {change.b.shape[1]}")
    if not rank:
        raise _misfit(adapter, f"the matrices of {name} are of rank 0")
    embeds = isinstance(module, nn.Embedding)
    shape = (change.a.shape[1], change.b.shape[0]) if embeds else (change.b.shape[0], change.a.shape[1])
    _check_shape(adapter, name, shape, module.weight.shape)
    scale = adapter.config.scale(name, rank)
    delta = change.b @ change.a
    merged = module.weight.to(torch.float32) + scale * (delta.T if embeds else delta)
    _set(model, f"{name}.weight", merged, adapter)
    if change.b_bias is not None:
        if not isinstance(module.bias, nn.Parameter):
            raise _misfit(adapter, f"it has a bias of {name}, where the model has none")
        _check_shape(adapter, f"{name}.bias", change.b_bias.shape, module.bias.shape)
        _set(model, f"{name}.bias", module.bias.to(torch.float32) + scale * change.b_bias, adapter)


def _set(model: PreTrainedModel, name: str, value: Tensor, adapter: Adapter) -> None:
    """Give the parameter of that name that value, which nothing else shares from then on."""
    if not torch.isfinite(value).all():
        raise _misfit(adapter, f"merged, {name} has values that are not finite")
    module_name, _, parameter = name.rpartition(".")
    module = model.get_submodule(module_name)
    shared = getattr(module, parameter)
    setattr(module, parameter, nn.Parameter(value.contiguous(), requires_grad=False))
    if any(one is shared for one in model.parameters()):
        model.config.tie_word_embeddings = False


def _check_shape(adapter: Adapter, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        raise _misfit(adapter, f"{name} is of shape {list(expected)} in the model, and {list(found)} in the adapter")


def _misfit(adapter: Adapter, fault: str) -> InputError:
    stated = adapter.config.base_model_name_or_path
    trained_on = f"it says that it was trained on {one_line(stated)}; " if stated else ""
    return InputError(
        f"the adapter {adapter.folder} does not fit this base model: {fault}; "
        f"{trained_on}give the base model that it was trained on"
    )


def _check_pattern(pattern: str, where: Path) -> None:
    """Raise `InputError` for a regular expression that is none, or that could take forever."""
    fault = None
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        fault = f"alpha_pattern {shown(pattern)} is no regular expression: {error}"
    if sum(pattern.count(sign) for sign in "*+{") > MOST_REPEATS or REPEATED_GROUP.search(pattern):
        fault = f"alpha_pattern {shown(pattern)} has more repeats than names of layers need"
    if fault:
        raise CONFIG.unfit(where, fault)


def merged_identity(base: dict[str, Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return what a file made from the merged model records: the identity of its `base`, with the adapters.

    The hash is of the base's and the adapters', not of the merged values, which differ by rounding between machines.
    """
    if not adapters:
        return base
    together = " ".join([base["weights_sha256"], *(one.sha256 for one in adapters)])
    return {
        **base,
        "name": " + ".join([base["name"], *(one.identity()["name"] for one in adapters)]),
        "weights_sha256": hashlib.sha256(together.encode()).hexdigest(),
        "base_weights_sha256": base["weights_sha256"],
        "adapters": [one.identity() for one in adapters],
    }
