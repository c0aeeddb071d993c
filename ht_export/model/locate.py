"""Where a checkpoint's files are, and a look at each of them before a library reads it."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file

from ht_export.foreign import foreign_code
from ht_export.model.families import FAMILIES, OTHER_KINDS, check_supported
from ht_export.model.gguf_header import MAGIC, check_header
from ht_export.model.known import KNOWN_MODELS, KnownModel
from ht_export.model.stated import CONFIG, FETCH_AGAIN, GENERATION, INDEX, Kind, Stated, StoredWeights
from ht_export.model.tensors import opened_tensors, shapes
from runtime.errors import InputError, nearest
from runtime.formats import Format, JsonFormat

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"

# Other libraries read them: that they are JSON, and how large, is all that is asked of them here.
TOKENIZER = JsonFormat("tokenizer of a checkpoint", 1 << 28, FETCH_AGAIN, kind=dict[str, msgspec.Raw])
OBJECT = JsonFormat("JSON file of a checkpoint", 1 << 26, FETCH_AGAIN, kind=dict[str, msgspec.Raw])
TEXT = Format("text file of a checkpoint", 1 << 26, FETCH_AGAIN)
VOCABULARY = Format("vocabulary file of a checkpoint", 1 << 27, FETCH_AGAIN)
WEIGHTS = Format("safetensors file of weights", 1 << 26, FETCH_AGAIN)

OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json",
           "processor_config.json", "tekken.json")  # fmt: skip
TEXTS = ("chat_template.jinja", "merges.txt", "vocab.txt")
VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class Location:
    """Where a checkpoint's files are: a folder or hub id, and the GGUF file inside it if it is one."""

    path: str
    gguf_file: str | None = None

    def find(self, name: str) -> Path | None:
        """Return where the file `name` is, which a hub id's is fetched for, or None where the checkpoint has none."""
        folder = Path(self.path)
        if folder.is_dir():
            return folder / name if (folder / name).exists() else None
        with foreign_code(f"cannot fetch {name} of {self.path}", "check the hub id and the connection"):
            found = cached_file(
                self.path,
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        return None if found is None else Path(found)


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
            if file.read(4) != MAGIC:
                raise InputError(f"{source} is not a GGUF file (it does not begin with 'GGUF'); fetch it again")
        return Location(str(path.parent), path.name)
    if path.is_absolute() or source.startswith(".") or source.count("/") != 1 or source.endswith(".gguf"):
        names = ", ".join(KNOWN_MODELS)
        raise InputError(
            f"no checkpoint at {source}; give a Hugging Face folder, a .gguf file, a hub id (owner/name) "
            f"or one of: {names}{nearest(source, tuple(KNOWN_MODELS))}"
        )
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            raise InputError(
                f"{source} is neither a local folder nor in the local hub cache, and HF_HUB_OFFLINE is set; "
                "unset it to download, or give a local folder"
            )
    return Location(source)


def check_files(location: Location, source: str) -> None:
    """Look at the files beside the weights that are read with them. Raises `InputError` for one that cannot be read, or
    is of a model that is not supported.
    """
    if location.gguf_file is None and (config := location.find(CONFIG_FILE)):
        _check_config_file(config, source)
    if generation := location.find("generation_config.json"):
        GENERATION.read(generation)
    if tokenizer := location.find("tokenizer.json"):
        TOKENIZER.read(tokenizer)
    for name in OBJECTS:
        if path := location.find(name):
            OBJECT.read(path)
    templates = sorted(Path(location.path, "additional_chat_templates").glob("*.jinja"))
    for path in (*filter(None, map(location.find, TEXTS)), *templates):
        TEXT.text(path)
    for path in filter(None, map(location.find, VOCABULARIES)):
        VOCABULARY.content(path)


def stored_weights(location: Location, named: str | None) -> StoredWeights | None:
    """Return what the weight files hold, those that a configuration has `named` where it does, by their headers alone.

    None stands for files that are not found here, and will not be where they are loaded. Raises `InputError`.
    """
    if location.gguf_file is not None:
        path = location.find(location.gguf_file)
        return None if path is None else check_header(path)
    files = weight_files(location, named)
    parameters = tensors = 0
    for path in files:
        with opened_tensors(path, WEIGHTS) as file:
            found = shapes(file)
        parameters += sum(math.prod(shape) for shape in found.values())
        tensors += len(found)
    return StoredWeights(parameters, tensors) if files else None


def weight_files(location: Location, named: str | None) -> list[Path]:
    """Return the safetensors files of the weights, those that a configuration has `named` where it does."""
    first = [named] if named else [WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json"]
    path = next(filter(None, map(location.find, first)), None)
    if path is None:
        # Shards without an index.
        return sorted(Path(location.path).glob("*.safetensors"))
    if path.name.endswith(INDEX_SUFFIX):
        names = sorted(set(INDEX.read(path).weight_map.values()))
        return [path for path in map(location.find, names) if path is not None]
    return [path]


def _check_config_file(path: Path, source: str) -> None:
    """Raise `InputError` unless a model of a supported family is described, in numbers that one can have."""
    stated = CONFIG.read(path)
    kind = CONFIG.fit(stated, Kind, path)
    if kind.model_type not in FAMILIES:
        check_supported(_defaults(kind, stated), source)
    CONFIG.fit(stated, Stated, path)


def _defaults(kind: Kind, stated: dict[str, Any]) -> PretrainedConfig:
    """Return the configuration of that kind of model without what is `stated`: nothing is made of that."""
    try:
        config = AutoConfig.for_model(kind.model_type)
    except Exception:
        # No class is known for it: told by the names of its fields alone.
        config = PretrainedConfig()
        config.model_type = kind.model_type
        for name in chain(*OTHER_KINDS.values()):
            setattr(config, name, bool(stated.get(name)))
    config.architectures = kind.architectures
    return config


def _locate_package(name: str, known: KnownModel) -> Location:
    # The package's own imports need libraries that we do not: find its files without importing it.
    spec = importlib.util.find_spec(known.package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders or not (Path(folders[0]) / known.file).is_file():
        raise InputError(f"the weights of {name} are not installed; install them with: {known.pip_line}")
    return Location(folders[0], known.file)


def _locate_folder(folder: Path) -> Location:
    config = folder / CONFIG_FILE
    if not config.is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"give the file itself: {ggufs[0]}" if ggufs else "it is not a Hugging Face model folder"
        raise InputError(f"{folder} has no config.json; {hint}")
    CONFIG.read(config)
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no weights at all"
        raise InputError(
            f"{folder} has no .safetensors weights (found {found}); only safetensors and GGUF are read, "
            "convert the weights first"
        )
    for index in folder.glob(f"*{INDEX_SUFFIX}"):
        needed = set(INDEX.read(index).weight_map.values())
        missing = sorted(needed - {path.name for path in folder.glob("*.safetensors")})
        if missing:
            raise InputError(f"{folder} lacks {len(missing)} of its weight files (first: {missing[0]}); fetch it again")
    return Location(str(folder))
