"""Checkpoints of base models and what belongs to one: adapters, transfer layers, skipped blocks."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ht_export.bundle import check_tokenizer
from ht_export.model.adapters import CONFIG_NAME, WEIGHTS_NAME, merge, read_adapter
from ht_export.model.blocks import MOST_DRAFTED, Blocks, SkippedBlocks, read_skipped_blocks, write_skipped_blocks
from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.families import FAMILIES
from ht_export.model.transfer import TransferFile, load_transfer_layers, save_transfer_layers
from ht_export.prompts import encode_chat
from tests.conftest import CHAT_TEMPLATE, byte_tokenizer, random_transfer, save_checkpoint, tiny_llama
from tests.hostile.binaries import damaged_safetensors
from tests.hostile.cases import Case, FaultError, Kind, Kinds, load_json
from tests.hostile.damage import damaged, damaged_json
from tests.hostile.templates import templates

KINDS = Kinds()


def one_file(name: str, content: bytes) -> Case:
    """Return the case of one file with this content."""
    return Case({name: content})


@cache
def base_model(folder: Path) -> BaseModel:
    """Return the tiny base model, whose files are in `folder` from then on."""
    if not folder.exists():
        # In shards, with an index.
        save_checkpoint(folder, tiny_llama(), max_shard_size="40KB")
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        for name, content in (("added_tokens.json", {"<pad>": 0}), ("special_tokens_map.json", {"bos_token": "<s>"})):
            (folder / name).write_text(json.dumps(content))
    return load_base_model(str(folder))


def base_of(folder: Path) -> BaseModel:
    """Return the base model of a kind whose files are in `folder`."""
    return base_model(folder.parent / "base")


def _use_model(base: BaseModel) -> None:
    """Use a model as an export does, as far as that is quick."""
    base.identity()
    base.stop_tokens()
    check_tokenizer(base)
    ids = encode_chat(base.tokenizer, ["Hello, tea.", "Again"], ["Yes"])
    if max(ids) >= base.model.config.vocab_size:
        raise FaultError(f"the tokenizer makes token {max(ids)}, and was not refused")
    with torch.no_grad():
        base.model(torch.tensor([ids[:8]]))


@KINDS.add(
    "checkpoints",
    "model configuration",
    "configuration of generation",
    "index of weight files",
    "safetensors file of weights",
    "tokenizer of a checkpoint",
    "JSON file of a checkpoint",
    "text file of a checkpoint",
    "vocabulary file of a checkpoint",
)
def _checkpoints(folder: Path) -> Kind:
    base_model(folder)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    shards = [name for name in files if name.endswith(".safetensors")]
    documents = [name for name in files if name.endswith(".json")]
    more: tuple[Any, ...] = (*FAMILIES, "bert", "mamba", "t5", {"rope_type": "yarn", "factor": 4.0}, "float16", "int8")

    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        what = draw(
            st.sampled_from(
                ("config.json", "config.json", "document", "document", "shard", "template", "vocabulary", "swap")
            )
        )
        if what == "swap":
            one, other = draw(st.sampled_from(sorted(files))), draw(st.sampled_from(sorted(files)))
            return Case({one: files[other], other: files[one]})
        if what == "shard":
            one = draw(st.sampled_from(shards))
            return Case({one: draw(st.one_of(damaged_safetensors(files[one]), st.none()))})
        if what == "template":
            return Case({"chat_template.jinja": draw(templates()).encode("utf-8", "surrogatepass")})
        if what == "vocabulary":
            one = draw(st.sampled_from(("tokenizer.model", "vocab.txt", "merges.txt", "vocab.json")))
            removed: dict[str, bytes | None] = draw(st.sampled_from(({}, {"tokenizer.json": None})))
            return Case({one: draw(damaged(files["tokenizer.json"])), **removed})
        one = draw(st.sampled_from(documents)) if what == "document" else what
        return Case({one: draw(damaged_json(json.loads(files[one]), more))})

    return Kind(folder, cases(), lambda case: _use_model(load_base_model(str(folder))))


@KINDS.add("quantised checkpoints", "model configuration", "safetensors file of weights")
def _quantised_checkpoints(folder: Path) -> Kind:
    save_checkpoint(folder, tiny_llama())
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        module = name.removesuffix(".weight")
        del tensors[name]
        tensors |= {f"{module}.qweight": torch.ones(4, 32, dtype=torch.int32), f"{module}.scales": torch.ones(2, 32)}
        tensors |= {f"{module}.qzeros": torch.ones(2, 4, dtype=torch.int32)}
        tensors |= {f"{module}.g_idx": torch.arange(32, dtype=torch.int32) // 16}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 4, "block_structure": [8, 8]}
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "weight_block_size": [2, 2], "dynamic": {},
                                     "config_groups": {"a": {"weights": weights, "format": None}}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shard = (folder / "model.safetensors").read_bytes()
    more: tuple[Any, ...] = ("awq", "fp8", "compressed-tensors", "gptq_v2", "pack-quantized", "marlin", 2, 8)
    cases = st.one_of(
        st.builds(partial(one_file, "model.safetensors"), damaged_safetensors(shard)),
        st.builds(lambda content: Case({"config.json": content}), damaged_json(config, more)),
    )
    return Kind(folder, cases, lambda case: _use_model(load_base_model(str(folder))))


def write_gguf(path: Path) -> list[int]:
    """Write the tiny model as a GGUF file; return the places of its fields."""
    config = tiny_llama().config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    names = [token for token, _ in tokens]
    names += [f"<unused{number}>" for number in range(len(names), config.vocab_size)]
    names[-2:] = ["ab", "<|endoftext|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([3 if number < 5 else 1 for number in range(len(names))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    random = np.random.default_rng(0)
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_key_value_heads * 8
    shapes = {"token_embd": (config.vocab_size, width), "output_norm": (width,)}
    for layer in range(config.num_hidden_layers):
        shapes |= {
            f"blk.{layer}.{part}": shape
            for part, shape in {
                "attn_norm": (width,),
                "ffn_norm": (width,),
                "attn_q": (width, width),
                "attn_k": (heads, width),
                "attn_v": (heads, width),
                "attn_output": (width, width),
                "ffn_gate": (inner, width),
                "ffn_up": (inner, width),
                "ffn_down": (width, inner),
            }.items()
        }
    for part, shape in shapes.items():
        writer.add_tensor(f"{part}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(path)
    places = [0, 4, 8, 16, *(field.offset for field in reader.fields.values())]
    # Behind a name there are its type and its value.
    places += [field.offset + 8 + len(name) + more for name, field in reader.fields.items() for more in (0, 4, 8, 12)]
    for tensor in reader.tensors:
        start = tensor.field.offset
        places += [start, *(start + 8 + len(tensor.name) + more for more in (0, 4, 12, 20, 24, 28))]
    return [place for place in places if place < path.stat().st_size]


@KINDS.add("GGUF files", "GGUF file")
def _ggufs(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    path = folder / "model.gguf"
    places = write_gguf(path)
    cases = st.builds(lambda content: Case({path.name: content}), damaged(path.read_bytes(), places))
    return Kind(folder, cases, lambda case: _use_model(load_base_model(str(path))))


@KINDS.add("adapters", "configuration of an adapter", "safetensors file of an adapter")
def _adapters(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 3, ".*layers.1.*": 2},
        "base_model_name_or_path": "somebody/something",
        "init_lora_weights": True,
    }
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    save_file({**tensors, "base_model.model.model.norm.weight": torch.ones(32)}, folder / WEIGHTS_NAME)

    def use(case: Case) -> None:
        adapter = read_adapter(folder)
        merge(tiny_llama(), adapter)

    cases = st.one_of(
        st.builds(lambda content: Case({CONFIG_NAME: content}), damaged_json(config, ("DORA", "pissa", {"(a": 2}))),
        st.builds(partial(one_file, WEIGHTS_NAME), damaged_safetensors((folder / WEIGHTS_NAME).read_bytes())),
    )
    return Kind(folder, cases, use)


@KINDS.add("transfer layers", "description of transfer layers", "safetensors file of transfer layers")
def _transfer_layers(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    path = folder / "transfer.safetensors"
    base = base_of(folder)
    foresight = [{"temperature": 0.8, "steps": [{"power": 0.9, "trust": 0.5, "rest": 20.0, "log_loss": 1.5}] * 3}]
    bins = [{"bins": [{"predicted": 0.1, "observed": 0.2}]}] * 3
    acceptance = {"calibration": bins, "top": {"1": [0.5, 0.4, 0.3]}, "foresight": foresight}
    about = TransferFile(base.identity(), {"steps": 5}, acceptance)
    save_transfer_layers(path, random_transfer((3, 1, 3), correction_rank=4, draft_tokens=[0, 2, 5, 263]), about)

    def use(case: Case) -> None:
        # As asked by somebody who does not have the model, and by somebody who does.
        load_transfer_layers(path)
        transfer, _ = load_transfer_layers(path, base.identity())
        transfer(0, torch.zeros(1, base.model.config.hidden_size))
        transfer.digest()

    content = damaged_safetensors(path.read_bytes(), "hidden_transfer")
    save_transfer_layers(path, random_transfer((4, 4), drafter="medusa"), about)
    content |= damaged_safetensors(path.read_bytes(), "hidden_transfer")
    cases = st.builds(lambda content: Case({path.name: content}), content)
    return Kind(folder, cases, use)


@KINDS.add("skipped blocks", "file of skipped blocks")
def _skipped_blocks(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    path = folder / "blocks.json"
    identity = base_of(folder).identity()
    write_skipped_blocks(path, SkippedBlocks.of(Blocks((1, 2), (0,)), identity, 4, 0.5, {"budget": 9}))

    def use(case: Case) -> None:
        found = read_skipped_blocks(path, identity)
        if not found.blocks.kept_attention(identity["num_layers"]) or not 1 <= found.draft_tokens <= MOST_DRAFTED:
            raise FaultError(f"no draft: {found!r}")

    cases = st.builds(lambda content: Case({path.name: content}), damaged_json(load_json(path)))
    return Kind(folder, cases, use)
