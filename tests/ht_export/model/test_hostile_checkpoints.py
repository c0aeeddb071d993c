"""Checkpoints that somebody damaged, or made to do harm: each is one error, before there is memory for it."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import hub as transformers_hub

from ht_export.foreign import foreign_code
from ht_export.model import checkpoint, locate
from ht_export.model.checkpoint import load_base_model
from runtime.errors import InputError
from tests.conftest import save_checkpoint, tiny_llama
from tests.families import tiny_model


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of this test alone, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture
def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets no configuration and no model be made: what is wrong must show before."""

    def made(*_: object, **__: object) -> None:
        raise AssertionError("it was made of a hostile file")

    for auto in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", made)


def change(path: Path, **changes: object) -> None:
    """Change fields of a JSON file; `...` takes one away."""
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def refused(folder: Path) -> str:
    """Return the error that loading the checkpoint in `folder` ends with: of one line, and none too long."""
    with pytest.raises(InputError) as raised:
        load_base_model(str(folder))
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


ABOVE_ALL = 10**400


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_position_embeddings", -5, ">= 1"),
        ("max_position_embeddings", 0, ">= 1"),
        ("max_position_embeddings", 10**15, "<= 134217728"),
        ("max_position_embeddings", 256.0, "`int`, got `float`"),
        ("max_position_embeddings", "256", "`int`, got `str`"),
        ("max_position_embeddings", None, "`int`, got `null`"),
        ("num_hidden_layers", 0, ">= 1"),
        ("num_hidden_layers", 10**6, "<= 4096"),
        ("num_hidden_layers", 10**9, "<= 4096"),
        ("num_hidden_layers", ABOVE_ALL, ""),
        ("num_hidden_layers", True, "`int`, got `bool`"),
        ("hidden_size", 10**9, "<= 65536"),
        ("hidden_size", -1, ">= 1"),
        ("intermediate_size", 10**9, "<= 1048576"),
        ("vocab_size", 10**12, "<= 16777216"),
        ("vocab_size", 0, ">= 1"),
        ("num_attention_heads", 0, ">= 1"),
        ("num_attention_heads", 10**6, "<= 4096"),
        ("num_key_value_heads", 0, ">= 1"),
        ("num_key_value_heads", -2, ">= 1"),
        ("head_dim", 0, ">= 1"),
        ("head_dim", 10**6, "<= 8192"),
        ("sliding_window", -1, ">= 0"),
        ("rope_theta", -1.0, "> 0"),
        ("rope_theta", 0, "> 0"),
        ("rope_theta", 1e300, "<= 1000000000000000"),
        ("rope_theta", "10000", "`float | null`, got `str`"),
        ("rms_norm_eps", -1e-5, ">= 0"),
        ("rms_norm_eps", 2, "<= 1"),
        ("rms_norm_eps", None, "`float`, got `null`"),
        ("num_labels", 10**9, "<= 1048576"),
        ("eos_token_id", "2", "got `str`"),
        ("eos_token_id", 1 << 40, ""),
        ("tie_word_embeddings", 1, "`bool | null`, got `int`"),
        ("transformers_weights", "../other.safetensors", "matching regex"),
        ("transformers_weights", "adapter_model.bin", "matching regex"),
        ("attn_implementation", "someone/kernel", "matching regex"),
        ("model_type", 5, "`str`, got `int`"),
        ("model_type", "x" * 1000, "length <= 100"),
    ],
)
def test_a_number_that_nobody_can_have_is_named_before_anything_is_made(
    folder: Path, field: str, value: object, allowed: str
) -> None:
    change(folder / "config.json", **{field: value})
    message = refused(folder)
    assert message.startswith(f"{folder / 'config.json'} is not a valid model configuration (")
    beginning = "1000000000" if value is ABOVE_ALL else repr(value)[:40]
    assert f"`$.{field}`, which is {beginning}" in message
    assert allowed in message


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta", "hidden_size"])
def test_a_number_that_is_none_is_named(folder: Path, field: str, number: str) -> None:
    change(folder / "config.json", **{field: "HERE"})
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"HERE"', number))
    message = refused(folder)
    assert number in message or "out of range" in message


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize(
    ("rope", "told"),
    [
        ({"rope_type": "linear", "factor": 0}, "`$.rope_parameters.factor`, which is 0"),
        ({"rope_type": "linear", "factor": "2"}, "`$.rope_parameters.factor`, which is '2'"),
        ({"rope_type": 5}, "`$.rope_parameters.rope_type`, which is 5"),
        ({"rope_theta": -1}, "`$.rope_parameters.rope_theta`, which is -1"),
        ({"full_attention": {"rope_theta": 0}}, "`$.rope_parameters.full_attention.rope_theta`, which is 0"),
        ({"rope_type": "longrope", "short_factor": [1.0, 0]}, "`$.rope_parameters.short_factor[1]`, which is 0"),
        ({"partial_rotary_factor": 2}, "`$.rope_parameters.partial_rotary_factor`, which is 2"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings`, which is 0"),
        ([1], "got `array`"),
    ],
)
def test_rotary_embeddings_of_nobody(folder: Path, rope: object, told: str) -> None:
    change(folder / "config.json", rope_parameters=rope)
    assert told in refused(folder)


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, and must divide num_attention_heads, 4"),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": ...},
            "num_attention_heads is 5, and must divide hidden_size, 32, without a head_dim",
        ),
    ],
)
def test_heads_that_do_not_divide(folder: Path, changes: dict[str, Any], told: str) -> None:
    change(folder / "config.json", **changes)
    assert told in refused(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 1 << 24},
        {"hidden_size": 1 << 16, "head_dim": 8},
        {"intermediate_size": 1 << 20},
        {"num_hidden_layers": 4096},
        # Tensors of a few values, and thousands of modules.
        {"num_hidden_layers": 1000, "hidden_size": 4, "intermediate_size": 1, "vocab_size": 1, "head_dim": 2},
        # What is not stated is a model of 7 billion.
        {"hidden_size": ..., "num_hidden_layers": ..., "intermediate_size": ..., "vocab_size": ..., "head_dim": ...},
    ],
)
def test_a_model_that_the_weight_files_cannot_hold_is_refused_before_it_is_made(
    folder: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    change(folder / "config.json", **changes)
    message = refused(folder)
    assert "parameters at least, and its weight files hold" in message
    stated = json.loads((folder / "config.json").read_text())
    for field in ("hidden_size", "vocab_size"):
        assert f"{field} " in message and str(stated.get(field, "")) in message


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}}, "'gemma3', a multimodal model"),
        ({"model_type": "mamba2", "num_hidden_layers": 10**9, "hidden_size": "x"}, "a state-space or recurrent model"),
        ({"model_type": "gpt2", "num_labels": 10**9}, "'gpt2', which is not supported; supported: llama"),
        (
            {"model_type": "of-tomorrow", "num_experts": 8},
            "'of-tomorrow', a mixture of experts, which is not supported",
        ),
        ({"model_type": "of-tomorrow", "__class__": 8}, "'of-tomorrow', which is not supported"),
        ({"num_labels": 10**9}, "missing required field `model_type`"),
    ],
)
def test_another_model_is_told_without_making_anything_of_what_it_states(
    folder: Path, config: dict[str, Any], told: str
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    assert told in refused(folder)


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "vocab.json",
)


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [DEEP, "[]", "{", "", "\udcff"], ids=["deep", "list", "cut", "empty", "no text"])
def test_a_damaged_json_file_is_one_error_that_names_it(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, errors="surrogateescape")
    assert refused(folder).startswith(f"{folder / name} is not a valid ")


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja", "merges.txt", "tokenizer.model"])
def test_a_file_without_end_is_not_read(folder: Path, name: str) -> None:
    with (folder / name).open("wb") as file:
        # Of holes, on no disk.
        file.truncate(1 << 40)
    assert "it has more than" in refused(folder)


@pytest.mark.usefixtures("nothing_is_made")
def test_a_pipe_in_a_folder_is_not_waited_for(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    assert "it is no regular file" in refused(folder)


@pytest.mark.parametrize("tokens", ["2", [2, "3"], 1 << 40, {"a": 1}])
def test_tokens_that_end_a_text_are_numbers(folder: Path, tokens: object) -> None:
    change(folder / "generation_config.json", eos_token_id=tokens)
    message = refused(folder)
    assert "generation_config.json is not a valid configuration of generation" in message
    assert "eos_token_id" in message


def test_a_token_below_all_ends_no_text(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[2, -1])
    assert load_base_model(str(folder)).stop_tokens() == [2]


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "a.bin", 5]
)
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: object) -> None:
    folder = save_checkpoint(tmp_path / "model", tiny_llama(), max_shard_size="30KB")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    change(index, weight_map={**json.loads(index.read_text())["weight_map"], "lm_head.weight": name})
    assert "model.safetensors.index.json is not a valid index of weight files" in refused(folder)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 72) + b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4]}}',
    ],
)
def test_a_header_of_weights_that_leads_nowhere(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(header)
    assert "model.safetensors is not a valid safetensors file of weights" in refused(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_named(folder: Path, value: float) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][5, 7] = value
    save_file(tensors, path, metadata={"format": "pt"})
    assert (
        f"the weight model.layers.2.mlp.up_proj.weight of layer 2 holds {value} at [5, 7], which is no finite number"
        in refused(folder)
    )


def test_a_place_beyond_the_first_part_is_counted_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "HASHED_AT_ONCE", 10)
    model = tiny_llama()
    model.model.embed_tokens.weight.data[100, 3] = math.nan
    with pytest.raises(InputError, match=r"here: the weight model\.embed_tokens\.weight holds nan at \[100, 3\]"):
        checkpoint.hash_weights(model, "here")


def test_weights_whose_sum_overflows_are_numbers() -> None:
    model = tiny_llama()
    before = checkpoint.hash_weights(model, "here")
    model.model.norm.weight.data[:] = torch.finfo(torch.float32).max
    assert checkpoint.hash_weights(model, "here") != before


class PanicException(BaseException):
    """As libraries in Rust raise it."""


def test_a_panic_is_an_error_and_an_interrupt_is_none() -> None:
    with (
        pytest.raises(InputError, match="cannot read it: index out of bounds; fetch it again"),
        foreign_code("cannot read it", "fetch it again"),
    ):
        raise PanicException("index out of bounds\nmore")
    for other in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(other), foreign_code("cannot read it", "fetch it again"):
            raise other
    for error in (RecursionError, MemoryError):
        with pytest.raises(InputError, match=f"cannot read it: {error.__name__}"), foreign_code("cannot read it", "x"):
            raise error


@pytest.mark.parametrize(
    "change_tokenizer",
    [
        lambda found: found.update(model={"type": "BPE", "vocab": {"a": 1 << 40}, "merges": []}),
        lambda found: found.update(model={"type": "WordPiece", "vocab": [], "unk_token": 3}),
        lambda found: found.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                                                  "invert": False}),
        lambda found: found.update(added_tokens=[{"id": -1}]),
        lambda found: found.clear(),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be(folder: Path, change_tokenizer: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    change_tokenizer(found)
    (folder / "tokenizer.json").write_text(json.dumps(found))
    message = refused(folder)
    assert message.startswith(f"cannot load {folder}: ")
    assert message.endswith("fetch it again")


RUNS = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nraise SystemExit('it ran')\n"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "both"])
@pytest.mark.parametrize("as_list", [False, True])
def test_code_that_comes_with_a_checkpoint_never_runs(folder: Path, name: str, as_list: bool) -> None:
    for module in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{module}.py").write_text(RUNS)
    tokenizer = ["tokenization_evil.T", "tokenization_evil.T"]
    classes: dict[str, Any] = {
        "AutoConfig": "configuration_evil.C",
        "AutoModelForCausalLM": "modeling_evil.M",
        "AutoTokenizer": tokenizer,
    }
    for file in ("config.json", "tokenizer_config.json"):
        if name in (file, "both"):
            change(folder / file, auto_map=tokenizer if as_list and file == "tokenizer_config.json" else classes)
    load_base_model(str(folder))
    # With an architecture of its own only its own code could read it.
    change(folder / "config.json", model_type="evil", auto_map=classes)
    assert "'evil'" in refused(folder)
    change(folder / "config.json", model_type="llama", architectures=["EvilForCausalLM"])
    change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    if name == "config.json":
        load_base_model(str(folder))
    else:
        assert "contains custom code" in refused(folder)
    assert not (folder / "ran").exists()


class Pickled:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors", "tokenizer.model", "vocab.json", "vocab.pkl"]
)
def test_nothing_is_unpickled(folder: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    torch.save({"model.embed_tokens.weight": Pickled(marker)}, folder / name)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    if name in ("pytorch_model.bin", "vocab.pkl"):
        # What nobody asked for is left where it is.
        load_base_model(str(folder))
    else:
        refused(folder)
    assert not marker.exists()


def test_a_hub_id_is_looked_at_as_a_folder_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache))
    for name in ("try_to_load_from_cache", "hf_hub_download"):
        inner = getattr(transformers_hub, name)
        monkeypatch.setattr(inner, "__kwdefaults__", {**(inner.__kwdefaults__ or {}), "cache_dir": str(cache)})
    assert load_base_model("someone/tiny").identity()["hidden_size"] == 32
    config = repository / "snapshots" / ("0" * 40) / "config.json"
    change(config, num_hidden_layers=10**9)
    with pytest.raises(InputError, match=r"config\.json is not a valid model configuration .*10{9}"):
        load_base_model("someone/tiny")


GGUF_FIELDS: dict[str, Any] = {
    "block_count": 2,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "context_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "vocab_size": 264,
    "rope.freq_base": 10000.0,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def write_gguf(path: Path, arch: str = "llama", **changes: Any) -> Path:
    """Write the header of a small Llama with some fields changed, and one tensor."""
    writer = gguf.GGUFWriter(path, arch)
    for name, value in {**GGUF_FIELDS, **changes}.items():
        kind = gguf.GGUFValueType.get_type(value)
        if kind == gguf.GGUFValueType.INT32 and not -(1 << 31) <= value < 1 << 31:
            kind = gguf.GGUFValueType.INT64
        writer.add_key_value(name if name.count(":") else f"{arch}.{name}", value, kind)
    writer.add_tensor("token_embd.weight", np.zeros((264, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("block_count", 10**9, "<= 4096"),
        ("block_count", 0, ">= 1"),
        ("block_count", "2", "`int | null`, got `str`"),
        ("embedding_length", 10**9, "<= 65536"),
        ("context_length", -5, ">= 1"),
        ("context_length", 10**15, "<= 134217728"),
        ("attention.head_count_kv", 0, ">= 1"),
        ("attention.key_length", 0, ">= 1"),
        ("vocab_size", 10**12, "<= 16777216"),
        ("rope.freq_base", math.nan, "> 0"),
        ("rope.freq_base", -1.0, "> 0"),
        ("attention.layer_norm_rms_epsilon", math.nan, ">= 0"),
        ("attention.layer_norm_rms_epsilon", math.inf, "<= 1"),
    ],
)
def test_a_number_of_a_gguf_file_that_nobody_can_have(tmp_path: Path, field: str, value: Any, allowed: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", **{field: value})
    message = refused(path)
    assert message.startswith(f"{path}, llama is not a valid GGUF file (")
    assert f"`$.{field}`, which is {value!r}" in message
    assert allowed in message


def test_a_gguf_file_that_cannot_hold_its_model(tmp_path: Path) -> None:
    message = refused(write_gguf(tmp_path / "model.gguf"))
    assert "states 2 layers of hidden_size 32" in message
    assert "its weight files hold 8448 in 1 tensors" in message


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def head(tensors: int, fields: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


LARGEST = (1 << 64) - 1
ARRAY = struct.pack("<I", 9)
TENSOR = text(b"a") + struct.pack("<IQQ", 2, 4, 4)


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (head(1, 1, version=9), "it is of version 9; 2 and 3 are read"),
        (head(1, LARGEST), f"the number of fields is {LARGEST}, and at most"),
        (head(LARGEST, 0), f"the number of tensors is {LARGEST}, and at most"),
        (head(1, 1), "its header goes on after its 24 bytes"),
        (head(1, 1) + text(b"a", 60_000), "goes on after"),
        (head(1, 1) + text(b"a", LARGEST), "the length of the name of a field is"),
        (head(1, 1) + text(b"\xff") + struct.pack("<I", 0) + b"1", "decode"),
        (head(1, 1) + text(b"a") + struct.pack("<I", 99), "is of the unknown or nested type 99"),
        (head(1, 1) + text(b"a") + struct.pack("<I", 8) + text(b"", LARGEST), "the length of the field 'a' is"),
        (head(1, 1) + text(b"a") + ARRAY + struct.pack("<IQ", 0, LARGEST), "the number of elements up to 'a' is"),
        (head(1, 1) + text(b"a") + ARRAY + struct.pack("<IQ", 0, 4_000_000), "goes on after"),
        (head(1, 1) + text(b"a") + ARRAY + struct.pack("<IQ", 8, 4_000_000), "goes on after"),
        (head(1, 1) + text(b"a") + ARRAY + struct.pack("<IQQ", 8, 2, LARGEST), "goes on after"),
        (head(1, 1) + text(b"a") + ARRAY + struct.pack("<IQ", 9, 1) * 1000, "nested type 9"),
        (head(1, 2) + (text(b"a") + struct.pack("<IB", 0, 1)) * 2, "two fields 'a'"),
        (head(1, 0) + text(b"a") + struct.pack("<I", LARGEST >> 32), "the number of dimensions of 'a' is"),
        (head(1, 0) + TENSOR + struct.pack("<IQ", 999, 0), "of the unknown type 999"),
        (head(1, 0) + TENSOR + struct.pack("<IQ", 0, 0), "tensor 'a' ends at byte"),
        (head(1, 0) + TENSOR + struct.pack("<IQ", 0, LARGEST), "tensor 'a' ends at byte"),
    ],
)
def test_a_gguf_header_that_leads_nowhere(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    message = refused(path)
    assert message.startswith(f"{path} is not a valid GGUF file (")
    assert told in message


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_gguf_file_cut_short(tmp_path: Path, share: float) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert refused(path).startswith(f"{path} is not a valid GGUF file (")


def test_every_number_that_families_state_is_one_that_they_can_have(tmp_path: Path) -> None:
    # Each has its own fields, and real ones spell out those that are not used.
    for name in ("gemma3", "phi3, longrope", "cohere", "granite", "olmo", "llama, llama3 scaling"):
        folder = save_checkpoint(tmp_path / name, tiny_model(name))
        change(
            folder / "config.json",
            sliding_window=json.loads((folder / "config.json").read_text()).get("sliding_window"),
        )
        locate.check_files(locate.locate(str(folder)), name)
