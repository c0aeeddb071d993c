"""Weights are read and converted one at a time."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ht_export.graph.lazy_weights import hollow, written_as
from ht_export.graph.trace import build_graph
from ht_export.model.float32 import computing_in_float32
from ht_export.model.reference import HiddenTransferModel
from ht_export.scopes import collected
from tests.conftest import random_transfer, tiny_llama
from tests.families import tiny_model

IDS = torch.arange(3, 20)[None]


def test_a_hollow_model_has_the_shapes_and_the_precision_and_no_memory() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(KeyError), hollow(model, torch.bfloat16) as real:
        for name, parameter in model.named_parameters():
            assert (parameter.shape, parameter.dtype) == (before[name].shape, torch.bfloat16)
            assert parameter.untyped_storage().nbytes() == 2
            torch.testing.assert_close(real[name], before[name])
        assert real["lm_head.weight"].data_ptr() == real["model.embed_tokens.weight"].data_ptr()
        raise KeyError
    torch.testing.assert_close(dict(model.named_parameters()), before)


def test_a_traced_model_is_freed_with_its_scope(traced_anew: None) -> None:
    """The tracer and the rewriter keep the last graph that they made."""

    def scope() -> dict[int, str]:
        model = HiddenTransferModel(tiny_llama(), random_transfer((3, 1, 3), correction_rank=4)).eval()
        build_graph(model, torch.float16)
        return {parameter.data_ptr(): name for name, parameter in model.named_parameters()}

    names = collected(scope())
    kept = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and o.device.type == "cpu"]
    assert {names[tensor.data_ptr()] for tensor in kept if tensor.data_ptr() in names and tensor.numel() > 1} == set()


def test_a_graph_does_not_outlive_its_model_unwritten() -> None:
    model = HiddenTransferModel(tiny_llama(), random_transfer((1,))).eval()
    with hollow(model, torch.float32) as real:
        tensor = written_as(real["base.lm_head.weight"], torch.float16, "head")
    assert tensor.numpy().dtype == np.float16
    del model, real
    collected(None)
    with pytest.raises(AssertionError, match="the model of head is gone"):
        tensor.numpy()


@pytest.mark.parametrize("name", ["llama, tied head", "gemma2", "stablelm, parallel, normed heads"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_model_computes_in_float32_with_rounded_weights(name: str, stored: torch.dtype) -> None:
    model, expected = tiny_model(name), tiny_model(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored)
    for tensor in (*expected.parameters(), *(b for b in expected.buffers() if b.ndim == 0)):
        tensor.data = tensor.data.to(stored).to(torch.float16).to(torch.float32)
    with computing_in_float32(model, torch.float16):
        found = model(IDS).logits
        assert {parameter.dtype for parameter in model.parameters()} == {stored}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(IDS).logits)
    # Outside it computes as ever.
    assert model(IDS).logits.dtype == stored


def test_weights_are_put_back_after_an_error() -> None:
    model = tiny_llama().to(torch.bfloat16)
    with computing_in_float32(model, torch.bfloat16), pytest.raises(IndexError):
        model(torch.tensor([[100_000]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, int]]:
    """Names and sizes of the lazy tensors that are read, in order."""
    found: list[tuple[str | None, int]] = []
    evaluate = ir.LazyTensor._evaluate

    def counting(self: ir.LazyTensor) -> ir.TensorProtocol:
        found.append((self.name, self.size))
        return evaluate(self)

    monkeypatch.setattr(ir.LazyTensor, "_evaluate", counting)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_matrix_is_read_before_the_graph_is_saved(
    evaluated: list[tuple[str | None, int]], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=1, tie_word_embeddings=False).to(
        torch.bfloat16
    )
    model = HiddenTransferModel(base, random_transfer((1,), 256)).eval()
    graph = build_graph(model, dtype)
    assert all(size <= 256 for _, size in evaluated)
    ir.save(graph, tmp_path / "g.onnx", external_data="g.onnx.data")
    saved = {name: value.const_value for name, value in ir.load(tmp_path / "g.onnx").graph.initializers.items()}
    layer = "model.base.model.layers.0"
    projections = [base.model.layers[0].self_attn.get_parameter(f"{kind}_proj.weight") for kind in "qkv"]
    expected = {
        "model.base.model.embed_tokens.weight": base.model.embed_tokens.weight,
        f"{layer}.self_attn.o_proj.weight": base.model.layers[0].self_attn.o_proj.weight.T,
        "+".join(f"{layer}.self_attn.{kind}_proj.weight" for kind in "qkv"): torch.cat(projections).T,
        "model.transfer.maps.0.weight": model.transfer.linears[0].weight.T,
    }
    for name, tensor in expected.items():
        stored = saved[name]
        assert stored is not None
        np.testing.assert_array_equal(stored.numpy(), tensor.to(dtype).numpy(), err_msg=name, strict=True)
