"""What tests trace once a run is what they would have traced each time."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from ht_export.graph import trace
from ht_export.model.reference import HiddenTransferModel
from tests.conftest import DRAFT_TOKENS, EXPORTED, random_transfer, tiny_llama
from tests.families import tiny_model
from tests.tracing import kind_of

EXAMPLE = (torch.zeros(2, 5),)
SHAPES = ({0: torch.export.Dim("B")},)


def computed(model: ir.Model) -> tuple[list[str], dict[str, bytes]]:
    """Return the nodes of a graph as it is written, without the names of them and of their values, and its weights."""
    model = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    nodes = [
        f"{node.domain} {node.op_type} {node.attributes} {[v.shape for v in node.outputs]}" for node in model.graph
    ]
    values = {value.name: value.const_value for value in model.graph.initializers.values()}
    return nodes, {n: v.numpy().tobytes() for n, v in values.items() if n and v and n.startswith("model.")}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_graph_is_the_same_whether_its_parts_were_traced_before_or_not(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HiddenTransferModel(tiny_model("llama", seed), random_transfer((1, 0, 1), seed=seed)).eval()
    nodes, weights = computed(trace.build_graph(model))
    monkeypatch.setattr(trace, "_exported", EXPORTED)
    expected_nodes, expected_weights = computed(trace.build_graph(model))
    assert nodes == expected_nodes
    assert weights == expected_weights


def test_models_whose_graphs_may_differ_are_of_other_kinds() -> None:
    """Here in what is around the layers."""
    norm, rotary = tiny_llama(), tiny_llama()
    norm.model.norm.variance_epsilon = 1e-3
    rotary.model.rotary_emb.inv_freq *= 2
    models = [
        HiddenTransferModel(tiny_llama(), random_transfer((1, 2))),
        HiddenTransferModel(tiny_llama(), random_transfer((2, 1))),
        HiddenTransferModel(tiny_llama(), random_transfer((1, 2), draft_tokens=DRAFT_TOKENS)),
        HiddenTransferModel(tiny_llama(), random_transfer((4, 4), drafter="medusa")),
        HiddenTransferModel(tiny_llama().to(torch.float16), random_transfer((1, 2))),
        HiddenTransferModel(tiny_llama(tie_word_embeddings=False), random_transfer((1, 2))),
        HiddenTransferModel(norm, random_transfer((1, 2))),
        HiddenTransferModel(rotary, random_transfer((1, 2))),
    ]
    kinds = [kind_of(model, EXAMPLE, SHAPES) for model in models]
    assert len(set(kinds)) == len(models)
    alike = HiddenTransferModel(tiny_llama(seed=1), random_transfer((1, 2), seed=2))
    assert kind_of(alike, EXAMPLE, SHAPES) == kinds[0]


@pytest.mark.parametrize(
    ("example", "shapes"),
    [
        ((torch.zeros(2, 6),), SHAPES),
        ((torch.zeros(2, 5, dtype=torch.int64),), SHAPES),
        (EXAMPLE, ({1: torch.export.Dim("B")},)),
        (EXAMPLE, ({0: torch.export.Dim("C")},)),
        (EXAMPLE, ({0: torch.export.Dim("B", min=2)},)),
    ],
)
def test_a_model_with_other_inputs_is_of_another_kind(example: tuple, shapes: tuple) -> None:
    model = tiny_llama()
    assert kind_of(model, example, shapes) != kind_of(model, EXAMPLE, SHAPES)
