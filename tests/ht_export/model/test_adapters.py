"""LoRA adapters merged at export: the numbers that PEFT's definition gives, and one error for what does not fit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ht_export.cli import main
from ht_export.model.checkpoint import load_base_model
from ht_export.model.shipped import transfer_layers
from ht_export.model.transfer import load_transfer_layers
from ht_export.parity.cli import main as parity
from runtime import Generator, InputError, Tokens
from tests.conftest import save_checkpoint, tiny_llama
from tests.families import tiny_model

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "/somewhere/tiny",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "task_type": "CAUSAL_LM",
}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lora(module: nn.Module, rank: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return A and B of a matrix."""
    assert isinstance(module, nn.Linear)
    return matrix(rank, module.in_features, seed=seed), matrix(module.out_features, rank, seed=seed + 1)


def factors(**modules: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (a, b) in modules.items():
        found |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    return found


def save(folder: Path, tensors: dict[str, Tensor], **changes: object) -> Path:
    """Write an adapter as PEFT lays it out."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of two matrices of the tiny Llama."""
    model = tiny_llama()
    return save(tmp_path / "mine", factors(**{name: lora(model.get_submodule(name)) for name in (Q, DOWN)}))


def merged(checkpoint: Path, *adapters: Path, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
    return dict(load_base_model(str(checkpoint), dtype, adapters=adapters).model.named_parameters())


def test_a_matrix_becomes_itself_and_the_scaled_product(tiny_checkpoint: Path, adapter: Path) -> None:
    before, after = merged(tiny_checkpoint), merged(tiny_checkpoint, adapter)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{Q}.weight", f"{DOWN}.weight"}
    for name in (Q, DOWN):
        a, b = lora(tiny_llama().get_submodule(name))
        torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 2 * b @ a)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"lora_alpha": 16}, 4.0),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2, r".*layers\.0\..*": 6}}, 1.5),
        ({"alpha_pattern": {"k_proj": 2}}, 2.0),
        ({"r": 64, "rank_pattern": {"q_proj": 4}}, 2.0),
        # PEFT leaves it out of account for the matrices of these families too.
        ({"fan_in_fan_out": True}, 2.0),
    ],
)
def test_the_scale_is_that_of_the_configuration(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, object], scale: float
) -> None:
    a, b = lora(tiny_llama().get_submodule(Q))
    after = merged(tiny_checkpoint, save(tmp_path / "mine", factors(**{Q: (a, b)}), **changes))
    torch.testing.assert_close(after[f"{Q}.weight"], merged(tiny_checkpoint)[f"{Q}.weight"] + scale * b @ a)


def test_a_tied_head_that_alone_is_changed_is_tied_no_more(tiny_checkpoint: Path, tmp_path: Path) -> None:
    a, b = matrix(4, 32), matrix(264, 4)
    base = load_base_model(str(tiny_checkpoint), adapters=[save(tmp_path / "mine", factors(lm_head=(a, b)))])
    before = merged(tiny_checkpoint)["model.embed_tokens.weight"]
    assert torch.equal(base.model.get_input_embeddings().weight, before)
    torch.testing.assert_close(base.model.get_output_embeddings().weight.data, before + 2 * b @ a)
    assert base.model.config.tie_word_embeddings is False


def test_embeddings_have_their_product_the_other_way_round(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", tiny_llama(tie_word_embeddings=False))
    a, b = matrix(4, 264), matrix(32, 4)
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    adapter = save(tmp_path / "mine", {f"{name}A": a, f"{name}B": b})
    before, after = merged(folder), merged(folder, adapter)
    embeddings = "model.embed_tokens.weight"
    torch.testing.assert_close(after[embeddings], before[embeddings] + 2 * (b @ a).T)
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_biases_and_whole_modules_take_the_place_of_the_base_models(tmp_path: Path) -> None:
    base = tiny_model("llama, biases")
    folder = save_checkpoint(tmp_path / "model", base)
    a, b = lora(base.get_submodule(Q))
    adapter = save(
        tmp_path / "mine",
        {
            **factors(**{Q: (a, b)}),
            f"base_model.model.{Q}.lora_B.bias": matrix(32, seed=5),
            f"base_model.model.{DOWN}.base_layer.bias": matrix(32, seed=6),
            "base_model.model.lm_head.modules_to_save.weight": matrix(264, 32, seed=7),
            "base_model.model.model.norm.weight": matrix(32, seed=8),
        },
        bias="all",
    )
    before, after = merged(folder), merged(folder, adapter)
    torch.testing.assert_close(after[f"{Q}.bias"], before[f"{Q}.bias"] + 2 * matrix(32, seed=5))
    assert torch.equal(after[f"{DOWN}.bias"], matrix(32, seed=6))
    assert torch.equal(after["lm_head.weight"], matrix(264, 32, seed=7))
    assert torch.equal(after["model.norm.weight"], matrix(32, seed=8))


def test_several_are_merged_in_turn(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (a, b), (c, d) = lora(tiny_llama().get_submodule(Q)), lora(tiny_llama().get_submodule(Q), rank=2, seed=9)
    one, two = save(tmp_path / "one", factors(**{Q: (a, b)})), save(tmp_path / "two", factors(**{Q: (c, d)}))
    after = merged(tiny_checkpoint, one, two)[f"{Q}.weight"]
    torch.testing.assert_close(after, merged(tiny_checkpoint)[f"{Q}.weight"] + 2 * b @ a + 4 * d @ c)


def test_half_precision_is_not_what_the_sum_is_rounded_to(adapter: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", tiny_llama().to(torch.bfloat16))
    before, after = merged(folder, dtype=None), merged(folder, adapter, dtype=None)
    assert {name for name, one in after.items() if one.dtype == torch.float32} == {f"{Q}.weight", f"{DOWN}.weight"}
    a, b = lora(tiny_llama().get_submodule(Q))
    torch.testing.assert_close(after[f"{Q}.weight"], before[f"{Q}.weight"].float() + 2 * b @ a)


def test_the_identity_tells_base_and_adapters(tiny_checkpoint: Path, adapter: Path) -> None:
    base, both = load_base_model(str(tiny_checkpoint)), load_base_model(str(tiny_checkpoint), adapters=[adapter])
    identity = both.identity()
    assert identity["base_weights_sha256"] == base.weights_sha256 != identity["weights_sha256"] == both.weights_sha256
    (told,) = identity["adapters"]
    assert (told["name"], told["stated_base"]) == ("mine", "tiny")
    assert identity["name"].endswith(" + mine")
    assert "adapters" not in base.identity()
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert load_base_model(str(tiny_checkpoint), adapters=[adapter]).weights_sha256 != both.weights_sha256


def test_transfer_layers_of_the_base_are_taken_and_told(
    tiny_checkpoint: Path, tiny_transfer: Path, adapter: Path, tmp_path: Path
) -> None:
    base, both = load_base_model(str(tiny_checkpoint)), load_base_model(str(tiny_checkpoint), adapters=[adapter])
    _, about = transfer_layers(tiny_transfer, both)
    assert about["trained_for"]["weights_sha256"] == base.weights_sha256
    assert "trained_for" not in transfer_layers(tiny_transfer, base)[1]
    other = load_base_model(str(save_checkpoint(tmp_path / "other", tiny_llama(seed=1))), adapters=[adapter])
    with pytest.raises(InputError, match="for another model: weights_sha256"):
        load_transfer_layers(tiny_transfer, other.identity())


def refused(tmp_path: Path, checkpoint: Path, adapter: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_base_model(str(checkpoint), adapters=[adapter])
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "of the type 'IA3'"),
        ({"peft_type": None}, "of the type None"),
        ({"use_dora": True}, "uses DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "begun by 'pissa_niter_4'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "uses layer replication"),
        ({"r": 0}, "r`, which is 0"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"alpha_pattern": {"(a+)+": 3}}, "more repeats than names of layers need"),
        ({"alpha_pattern": {"(": 3}}, "is no regular expression"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tiny_checkpoint: Path, adapter: Path, tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    assert told in refused(tmp_path, tiny_checkpoint, adapter)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (factors(**{Q: (matrix(4, 48), matrix(32, 4))}), f"{Q} is of shape [32, 32] in the model, and [32, 48] in the"),
        (factors(**{Q: (matrix(4, 32), matrix(32, 3))}), "of ranks 4 and 3"),
        (factors(**{Q: (matrix(0, 32), matrix(32, 0))}), "of rank 0"),
        (factors(**{Q: (matrix(4, 32), torch.full((32, 4), torch.inf))}), "no finite"),
        (factors(**{Q: (torch.full((4, 32), 3e38), torch.full((32, 4), 3e38))}), "merged, "),
        (
            factors(**{"model.layers.9.mlp.up_proj": (matrix(4, 32), matrix(64, 4))}),
            "changes model.layers.9.mlp.up_proj",
        ),
        (factors(**{"model.norm": (matrix(4, 32), matrix(32, 4))}), "a LlamaRMSNorm, which is neither"),
        ({f"base_model.model.{Q}.lora_A.weight": matrix(4, 32)}, "has not both matrices"),
        ({f"base_model.model.{Q}.lora_A.weight": matrix(4, 32)[0]}, "has not both matrices"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": matrix(32)}, "uses DoRA"),
        ({f"base_model.model.{Q}.bias": matrix(32)}, "has a bias of"),
        ({"base_model.model.lm_head.weight": matrix(265, 32)}, "lm_head.weight is of shape [264, 32] in the model"),
        ({"something": matrix(3)}, "which is no part of a LoRA adapter"),
        ({}, "has no tensors"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(
    tiny_checkpoint: Path, tmp_path: Path, tensors: dict[str, Tensor], told: str
) -> None:
    assert told in refused(tmp_path, tiny_checkpoint, save(tmp_path / "mine", tensors))


def test_pickled_adapters_are_never_read(tiny_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "is a pickle file, which is never read" in refused(tmp_path, tiny_checkpoint, adapter)
    shutil.rmtree(adapter)
    assert "adapter_config.json is missing" in refused(tmp_path, tiny_checkpoint, adapter)


def merged_by_hand(folder: Path, out: Path, adapter: Path) -> Path:
    """Write the checkpoint in `folder` with the adapter in its weights."""
    shutil.copytree(folder, out)
    weights, tensors = load_file(out / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weights[f"{module}.weight"] += 2 * tensors[name.replace("lora_A", "lora_B")] @ a
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_engine_says_what_transformers_says_with_the_adapter_merged_by_hand(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(family)
    checkpoint = save_checkpoint(tmp_path / "model", model)
    names = (Q, "model.layers.1.mlp.gate_proj", "model.layers.1.self_attn.o_proj")
    adapter = save(tmp_path / "mine", factors(**{name: lora(model.get_submodule(name)) for name in names}))
    by_hand = load_base_model(str(merged_by_hand(checkpoint, tmp_path / "by-hand", adapter)))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n{"prompt": "abc"}\n')
    engine = tmp_path / "engine.onnx"
    options = ["--adapter", str(adapter), "--out", str(engine), "--measure", str(prompts), "--random-transfer"]
    assert main([str(checkpoint), *options]) == 0
    assert "tokens per step (plain decoding: 1.00), 2 prompts" in capsys.readouterr().err

    with Generator(engine, adapt=False) as generator:
        ids = list(generator.encode("Hello"))
        answer = generator.generate(Tokens(ids), max_new_tokens=16)
    text = {"max_new_tokens": 16, "do_sample": False}
    expected, alone = (one.generate(torch.tensor([ids]), **text)[0, len(ids) :] for one in (by_hand.model, model))
    assert answer.tokens == expected.tolist() != alone.tolist()
    assert [one["name"] for one in generator.about.base_model["adapters"]] == ["mine"]

    compared = [str(checkpoint), str(engine), "--no-evaluator", "--max-new-tokens", "8"]
    assert parity([*compared, "--adapter", str(adapter)]) == 0
    capsys.readouterr()
    assert parity(compared) == 1
    assert "with --adapter the adapters that were merged into it" in capsys.readouterr().err


def test_transfer_layers_of_the_base_are_noted_at_the_end(
    tiny_checkpoint: Path, tiny_transfer: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--transfer", str(tiny_transfer), "--adapter", str(adapter), "--out", str(tmp_path / "engine.onnx")]
    assert main([str(tiny_checkpoint), *options, "--precision", "int8"]) == 0
    told = capsys.readouterr().err
    assert "note: the transfer layers were trained for" in told
    assert "--measure PROMPTS tells, ht-train all --adapter trains others" in told
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n')
    assert main([str(tiny_checkpoint), *options, "--measure", str(prompts)]) == 0
    told = capsys.readouterr().err
    assert "how often is measured below, ht-train all" in told
    assert told.index("\nnote: ") < told.index("\ndrafts: ")
