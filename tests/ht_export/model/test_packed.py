"""Quantised checkpoints: weights are those that their formats say, or the variant is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ht_export.cli import main
from ht_export.model.checkpoint import load_base_model
from runtime import Generator, InputError, Tokens
from tests.conftest import save_checkpoint, tiny_llama

Q = "model.layers.0.self_attn.q_proj"
GROUP = 16
# What makes the tensors of a matrix [out, in], by the end of their names, with the weight that they stand for.
Maker = Callable[[Tensor, torch.Generator], tuple[dict[str, Tensor], Tensor]]


def words(values: list[list[int]], bits: int) -> Tensor:
    """Pack each row, bit by bit, as the formats describe: the first value in the lowest bits of the first word."""
    packed = []
    for row in values:
        total = sum(value << (bits * place) for place, value in enumerate(row))
        count = math.ceil(len(row) * bits / 32)
        packed.append([(total >> (32 * word)) & 0xFFFFFFFF for word in range(count)])
    return torch.tensor(packed, dtype=torch.int64).to(torch.int32)


def drawn(weight: Tensor, bits: int, random: torch.Generator, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [out, in], z and s [out, G]."""
    outputs, inputs = weight.shape
    quantised = torch.randint(0, 1 << bits, (outputs, inputs), generator=random)
    zeros = torch.randint(0, 1 << bits, (outputs, inputs // group), generator=random)
    scales = (0.02 + 0.02 * torch.rand(outputs, inputs // group, generator=random)).to(torch.float16)
    return quantised, zeros, scales


def stands_for(quantised: Tensor, zeros: Tensor, scales: Tensor, group_of: list[int] | None = None) -> Tensor:
    """Return (q - z) s, value by value."""
    return torch.stack(
        [
            (quantised[:, i] - zeros[:, g]).float() * scales[:, g].float()
            for i, g in enumerate(group_of or [i // GROUP for i in range(quantised.shape[1])])
        ],
        dim=1,
    )


def awq(weight: Tensor, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    quantised, zeros, scales = drawn(weight, 4, random)

    def packed(values: Tensor) -> Tensor:
        order = [8 * (place // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[place % 8] for place in range(values.shape[0])]
        return words(values.T[:, order].tolist(), 4)

    tensors = {"qweight": packed(quantised), "qzeros": packed(zeros), "scales": scales.T}
    return tensors, stands_for(quantised, zeros, scales)


def gptq(bits: int, less: int = 1, act_order: bool = False) -> Maker:
    def make(weight: Tensor, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        quantised, zeros, scales = drawn(weight, bits, random)
        inputs = weight.shape[1]
        group_of = [i // GROUP for i in range(inputs)]
        if act_order:
            group_of = [group_of[i] for i in torch.randperm(inputs, generator=random).tolist()]
        tensors = {
            "qweight": words(quantised.tolist(), bits).T,
            "qzeros": words(((zeros - less) % (1 << bits)).T.tolist(), bits),
            "scales": scales.T,
            "g_idx": torch.tensor(group_of, dtype=torch.int32),
            "bias": torch.zeros(weight.shape[0]),
        }
        return tensors, stands_for(quantised, zeros, scales, group_of)

    return make


def pack_quantized(bits: int, symmetric: bool) -> Maker:
    def make(weight: Tensor, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        quantised, zeros, scales = drawn(weight, bits, random)
        tensors = {
            "weight_packed": words(quantised.tolist(), bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if symmetric:
            zeros = torch.full_like(zeros, 1 << (bits - 1))
        else:
            tensors["weight_zero_point"] = words(zeros.T.tolist(), bits).T
        return tensors, stands_for(quantised, zeros, scales)

    return make


def int_quantized(weight: Tensor, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    quantised = torch.randint(-128, 128, weight.shape, generator=random)
    scales = 0.004 + 0.004 * torch.rand(weight.shape[0], 1, generator=random)
    zeros = torch.randint(-3, 4, (weight.shape[0], 1), generator=random)
    tensors = {
        "weight": quantised.to(torch.int8),
        "weight_scale": scales,
        "weight_zero_point": zeros.to(torch.int8),
        "input_scale": torch.ones(1),
    }
    return tensors, (quantised - zeros).float() * scales


def float_quantized(weight: Tensor, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    values = torch.randn(weight.shape, generator=random).to(torch.float8_e4m3fn)
    scale = torch.full((1,), 0.1, dtype=torch.bfloat16)
    return {"weight": values, "weight_scale": scale}, values.float() * scale.float()


def blocks(name: str) -> Maker:
    def make(weight: Tensor, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        values = torch.randn(weight.shape, generator=random).to(torch.float8_e4m3fn)
        # 24 divides neither 32 nor 64: the last blocks are smaller.
        sides = [math.ceil(size / 24) for size in weight.shape]
        scales = 0.1 + torch.rand(*sides, generator=random)
        each = [[scales[i // 24, j // 24] for j in range(weight.shape[1])] for i in range(weight.shape[0])]
        return {"weight": values, name: scales}, values.float() * torch.tensor(each)

    return make


def compressed(form: str, **weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "group_size": GROUP, "desc_act": False, "sym": False}
FORMATS: dict[str, tuple[Maker, dict[str, object]]] = {
    "awq": (awq, AWQ),
    "gptq, 4 bits": (gptq(4), {**GPTQ, "bits": 4}),
    "gptq, 8 bits": (gptq(8), {**GPTQ, "bits": 8, "checkpoint_format": "gptq"}),
    "gptq, 2 bits, by activations": (gptq(2, act_order=True), {**GPTQ, "bits": 2, "desc_act": True}),
    "gptq, second version": (gptq(4, less=0), {**GPTQ, "bits": 4, "checkpoint_format": "gptq_v2"}),
    "compressed-tensors, int4": (pack_quantized(4, True), compressed("pack-quantized", num_bits=4, symmetric=True)),
    "compressed-tensors, int4 with zero points": (
        pack_quantized(4, False),
        compressed("pack-quantized", num_bits=4, symmetric=False, strategy="group", group_size=GROUP),
    ),
    "compressed-tensors, packed int8": (pack_quantized(8, True), compressed("pack-quantized", num_bits=8)),
    "compressed-tensors, int8": (int_quantized, compressed("int-quantized", num_bits=8, strategy="channel")),
    "compressed-tensors, fp8": (float_quantized, compressed("float-quantized", num_bits=8, type="float")),
    "compressed-tensors, fp8 in blocks": (
        blocks("weight_scale"),
        compressed("float-quantized", num_bits=8, strategy="block", block_structure=[24, 24]),
    ),
    "fp8 in blocks": (blocks("weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [24, 24]}),
}


def quantise(folder: Path, make: Maker, stated: dict[str, Any]) -> dict[str, Tensor]:
    """Write the tiny Llama in half precision with all matrices of its layers quantised; return what they stand for."""
    save_checkpoint(folder, tiny_llama().to(torch.float16))
    random = torch.Generator().manual_seed(3)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        made, expected[name] = make(tensors.pop(name), random)
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in made.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    state(folder, stated)
    return expected


def state(folder: Path, stated: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_the_format_says(tmp_path: Path, name: str) -> None:
    expected = quantise(tmp_path, *FORMATS[name])
    base = load_base_model(str(tmp_path), None)
    found = dict(base.model.named_parameters())
    assert {name for name in found if name.endswith("_proj.weight")} == expected.keys()
    for weight, value in expected.items():
        assert torch.equal(found[weight], value), weight
    kept = tiny_llama().to(torch.float16).state_dict()["model.embed_tokens.weight"].float()
    assert torch.equal(found["model.embed_tokens.weight"], kept)
    assert base.stop_tokens() == [2]
    assert base.model.get_output_embeddings().weight is found["model.embed_tokens.weight"]


def test_an_engine_of_one_says_what_transformers_says_with_these_weights(tmp_path: Path) -> None:
    quantise(tmp_path / "model", *FORMATS["awq"])
    engine = tmp_path / "engine.onnx"
    assert main([str(tmp_path / "model"), "--random-transfer", "--out", str(engine), "--precision", "fp32"]) == 0
    with Generator(engine, adapt=False) as generator:
        ids = list(generator.encode("Hello"))
        answer = generator.generate(Tokens(ids), max_new_tokens=16)
    model = load_base_model(str(tmp_path / "model")).model
    expected = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :]
    assert answer.tokens == expected.tolist()


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "by 'bitsandbytes', which is not read; read are: AWQ"),
        ({"bits": 4}, "by None, which is not read"),
        ({**AWQ, "version": "gemv"}, "by AWQ with version 'gemv', which is not read; allowed: gemm"),
        ({**AWQ, "backend": "llm-awq"}, "backend 'llm-awq'"),
        ({**AWQ, "bits": 3}, "by AWQ with bits 3"),
        ({**GPTQ, "bits": 3}, "by GPTQ with bits 3, which is not read; allowed: 2, 4, 8"),
        ({**GPTQ, "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({**GPTQ, "bits": 4, "is_marlin_format": True}, "checkpoint_format 'marlin'"),
        ({**GPTQ, "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}, "dynamic True"),
        (compressed("nvfp4-pack-quantized", num_bits=4), "format 'nvfp4-pack-quantized'"),
        (compressed("marlin-24", num_bits=4), "format 'marlin-24'"),
        ({**compressed("dense"), "format": "int-quantized", "sparsity_config": {"format": "sparse-24-bitmask"}},
         "sparsity_config.format 'sparse-24-bitmask'"),
        ({**compressed("int-quantized"), "transform_config": {"config_groups": {"u": {}}}}, "transform_config True"),
        ({**AWQ, "bits": "x"}, "quantization_config of"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, stated: dict[str, object], told: str) -> None:
    quantise(tmp_path, *FORMATS["awq"])
    state(tmp_path, stated)
    with pytest.raises(InputError) as caught:
        load_base_model(str(tmp_path))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("awq", {"qzeros": None}, f"{Q} is not whole: qzeros is missing"),
        ("awq", {"qweight": torch.zeros(32, 4)}, "of type torch.float32"),
        ("awq", {"scales": torch.ones(3, 32)}, "scales [3, 32], zero points [2, 32]"),
        ("awq", {"other": torch.ones(3)}, f"no place for 1 of its weights (first: {Q}.other)"),
        ("awq", {"bias": torch.ones(32)}, f"(first: {Q}.bias)"),
        ("awq", {"weight": torch.ones(32, 32, dtype=torch.int8)}, f"{Q}.weight is stored as torch.int8, without"),
        ("awq", {"scales": torch.full((2, 32), torch.nan)}, "holds nan"),
        ("gptq, 4 bits", {"g_idx": torch.full((32,), 2, dtype=torch.int32)}, "in groups that are none of 2"),
        ("gptq, 4 bits", {"g_idx": None, "scales": torch.ones(5, 32)}, "scales [5, 32]"),
        ("compressed-tensors, int4", {"weight_shape": torch.tensor([32, 99])}, "weight_shape [32, 99]"),
        ("compressed-tensors, int4", {"weight_shape": torch.tensor(5)}, "weight_shape 5"),
        ("compressed-tensors, int8", {"weight_scale": torch.ones(7, 1)}, "scales of shape [7, 1]"),
        ("fp8 in blocks", {"weight_scale_inv": torch.ones(3, 2)}, "scales of shape [3, 2]"),
        ("fp8 in blocks", {"weight_scale_inv": None}, "without a scale"),
    ],
)
def test_what_does_not_fit_is_one_error_with_its_name(
    tmp_path: Path, name: str, changes: dict[str, Tensor | None], told: str
) -> None:
    quantise(tmp_path, *FORMATS[name])
    tensors = load_file(tmp_path / "model.safetensors")
    for part, value in changes.items():
        tensors.pop(f"{Q}.{part}", None)
        if value is not None:
            tensors[f"{Q}.{part}"] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        load_base_model(str(tmp_path))
    assert told in str(caught.value)
