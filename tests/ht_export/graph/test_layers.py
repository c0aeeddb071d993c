"""Layers that are traced once for each kind."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from ht_export.graph import layers, trace
from ht_export.graph.layers import described
from ht_export.model.reference import HiddenTransferModel
from tests.conftest import random_transfer, tiny_llama
from tests.families import tiny_model

SLIDING, FULL = "sliding_attention", "full_attention"


def tiny_gemma(kinds: list[str]) -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=len(kinds),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=kinds,
        sliding_window=8,
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture
def traced_layers(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The layers that were traced, as they are."""
    found: list[torch.nn.Module] = []
    original = layers._traced

    def noted(model: HiddenTransferModel, layer: torch.nn.Module, *others: object) -> layers.Kind:
        found.append(layer)
        return original(model, layer, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "_traced", noted)
    return found


@pytest.fixture(scope="module")
def llama() -> tuple[HiddenTransferModel, ir.Graph]:
    model = HiddenTransferModel(tiny_llama().eval(), random_transfer((3, 1, 3)))
    return model, trace.build_graph(model).graph


def test_each_kind_of_layer_is_traced_once(traced_layers: list[torch.nn.Module]) -> None:
    model = tiny_gemma([SLIDING, SLIDING, FULL, SLIDING, FULL])
    graph = trace.build_graph(HiddenTransferModel(model, random_transfer((2, 4)))).graph
    assert traced_layers == [model.model.layers[0], model.model.layers[2]]
    kinds = [node.op_type for node in graph if "TreeAttention" in node.op_type]
    windowed, plain = "WindowedTreeAttention", "TreeAttention"
    assert kinds == [windowed, windowed, plain, windowed, plain]
    # The model is as before.
    assert all(type(layer).__name__ == "Gemma3DecoderLayer" for layer in model.model.layers)


def test_layers_have_their_own_weights_in_order(llama: tuple[HiddenTransferModel, ir.Graph]) -> None:
    model, graph = llama
    names = [f"model.base.model.layers.{index}.mlp.down_proj.weight" for index in range(4)]
    read = [value.name for node in graph if node.op_type == "MatMul" for value in node.inputs if value]
    assert [name for name in read if name in names] == names
    for index, name in enumerate(names):
        found = graph.initializers[name].const_value
        assert found is not None
        np.testing.assert_array_equal(found.numpy(), model.base.model.layers[index].mlp.down_proj.weight.numpy().T)


def test_no_node_is_left_opaque_and_names_are_unique(llama: tuple[HiddenTransferModel, ir.Graph]) -> None:
    _, graph = llama
    assert layers.OPAQUE not in {node.op_type for node in graph}
    names = Counter(value.name for node in graph for value in node.outputs)
    assert names.most_common(1)[0][1] == 1


def test_what_computes_otherwise_is_of_another_kind() -> None:
    one, other = tiny_llama().model.layers[:2]
    assert described(one) == described(other)
    other.self_attn.scaling *= 2
    assert described(one) != described(other)
    other.self_attn.scaling = one.self_attn.scaling
    other.register_buffer("offset", torch.ones(2))
    one.register_buffer("offset", torch.zeros(2))
    assert described(one) != described(other)
    other.offset.zero_()
    assert described(one) == described(other)
    other.mlp.act_fn = torch.nn.GELU()
    assert described(one) != described(other)


def test_cosines_may_have_another_type_than_states() -> None:
    model = HiddenTransferModel(tiny_model("olmo2").eval(), random_transfer((1, 1)))
    graph = trace.build_graph(model, torch.float16).graph
    states = {value.dtype for value in (*graph.inputs, *graph.outputs) if value.name and "_cache_" in value.name}
    assert states == {ir.DataType.FLOAT16}
