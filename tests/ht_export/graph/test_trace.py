"""The exported graph against the PyTorch reference, in ONNX Runtime and in ONNX's own reference evaluator."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from ht_export.graph.domains import OPSET
from ht_export.model.checkpoint import load_base_model
from ht_export.model.reference import HiddenTransferModel
from ht_export.model.transfer import load_transfer_layers
from runtime import bindings
from runtime.bundle.engine_file import read_engine_file
from runtime.rows import lay_out
from runtime.tree import Tree
from tests.strategies import trees

STEPS = 3
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path, tiny_transfer: Path) -> HiddenTransferModel:
    transfer, _ = load_transfer_layers(tiny_transfer)
    return HiddenTransferModel(load_base_model(str(tiny_checkpoint)).model, transfer).eval()


@pytest.fixture(scope="module")
def onnx_runtime(tiny_engine: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tiny_engine, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, feed), strict=True))


@pytest.fixture(scope="module")
def evaluator(tiny_engine: Path) -> Run:
    model = ReferenceEvaluator(str(tiny_engine))
    return lambda feed: dict(zip(model.output_names, model.run(None, feed), strict=True))


def run_reference(model: HiddenTransferModel, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
    layers = range(len(model.base.model.layers))
    output = model(
        tensors[bindings.INPUT_IDS],
        tensors[bindings.POSITION_IDS],
        tensors[bindings.TREE_MASK],
        [tensors[bindings.pseudo_parent(k)] for k in range(1, STEPS + 1)],
        tensors[bindings.LOGIT_ROWS],
        tensors[bindings.CACHE_LENGTH],
        [tensors[bindings.key_cache(layer)] for layer in layers],
        [tensors[bindings.value_cache(layer)] for layer in layers],
    )
    results = {bindings.LOGITS: output.logits, bindings.DRAFT_LOGITS: output.draft_logits}
    results |= {bindings.key_new(layer): output.key_new[layer] for layer in layers}
    results |= {bindings.value_new(layer): output.value_new[layer] for layer in layers}
    return {name: tensor.numpy() for name, tensor in results.items()}


@st.composite
def feeds(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Inputs of one pass over any tree, any pseudo rows, any part of the logits, any cache; batches differ in all."""
    batch = draw(st.integers(1, 3))
    tree = draw(trees(max_rows=8))
    size = len(tree)
    counts = [draw(st.integers(0, size)) for _ in range(STEPS)]
    wanted = draw(st.integers(0, size))
    capacity = draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sequences = []
    lengths = []
    for _ in range(batch):
        other = Tree(rng.integers(0, 264, size), tree.parents, tree.depths, tree.probabilities)
        pseudo_parents = tuple(np.sort(rng.permutation(size)[:count]) for count in counts)
        lengths.append(int(rng.integers(0, capacity + 1)))
        logit_rows = np.sort(rng.permutation(size)[:wanted])
        # Transfer layers 3, 1, 3: step 2's rows join first.
        sequences.append(lay_out(other, pseudo_parents, (1, 0, 2), lengths[-1], logit_rows))
    feed = {
        bindings.INPUT_IDS: np.stack([rows.input_ids for rows in sequences]),
        bindings.POSITION_IDS: np.stack([rows.position_ids for rows in sequences]),
        bindings.TREE_MASK: np.stack([rows.tree_mask for rows in sequences]),
        bindings.LOGIT_ROWS: np.stack([rows.logit_rows for rows in sequences]),
        bindings.CACHE_LENGTH: np.array(lengths, dtype=np.int64),
    }
    for k in range(STEPS):
        feed[bindings.pseudo_parent(k + 1)] = np.stack([rows.pseudo_parents[k] for rows in sequences])
    for layer in range(4):
        for name in (bindings.key_cache(layer), bindings.value_cache(layer)):
            feed[name] = rng.standard_normal((batch, 2, capacity, 8)).astype(np.float32)
    return feed


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-4, rtol=1e-4, err_msg=name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(feed=feeds())
def test_onnx_runtime_computes_the_reference_for_any_tree(
    onnx_runtime: Run, reference: HiddenTransferModel, feed: dict[str, np.ndarray]
) -> None:
    assert_same(onnx_runtime(feed), run_reference(reference, feed))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(feed=feeds())
def test_the_onnx_reference_evaluator_computes_the_reference_for_any_tree(
    evaluator: Run, reference: HiddenTransferModel, feed: dict[str, np.ndarray]
) -> None:
    assert_same(evaluator(feed), run_reference(reference, feed))


def test_tree_attention_is_a_local_function_and_one_node_in_each_layer(tiny_engine: Path) -> None:
    model = onnx.load(tiny_engine, load_external_data=False)
    assert [(f.domain, f.name) for f in model.functions] == [("ht.llm", "TreeAttention")]
    assert sum(node.op_type == "TreeAttention" and node.domain == "ht.llm" for node in model.graph.node) == 4
    assert {o.domain: o.version for o in model.opset_import}[""] == OPSET


def test_normalisation_and_rotary_embedding_are_one_operator_each(tiny_engine: Path) -> None:
    model = onnx.load(tiny_engine, load_external_data=False)
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["RMSNormalization"] == 2 * 4 + 1
    assert counts["RotaryEmbedding"] == 2 * 4
    assert not counts["Neg"]


def test_projections_of_the_same_rows_are_one_product(tiny_engine: Path) -> None:
    model = onnx.load(tiny_engine, load_external_data=False)
    products = sum(node.op_type == "MatMul" for node in model.graph.node)
    # Queries, keys and values; output; gate and up; down. The head, and a transfer layer for each step.
    assert products == 4 * 4 + 1 + STEPS


def test_inputs_and_outputs_are_those_of_the_contract(tiny_engine: Path) -> None:
    model = onnx.load(tiny_engine, load_external_data=False)
    dims = read_engine_file(tiny_engine).dims
    types = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.BOOL: "bool", onnx.TensorProto.FLOAT: "float32"}
    for values, contract in ((model.graph.input, dims.inputs()), (model.graph.output, dims.outputs())):
        found = [
            bindings.Binding(
                value.name,
                types[value.type.tensor_type.elem_type],
                tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
            )
            for value in values
        ]
        assert found == contract


def test_weights_are_external(tiny_engine: Path) -> None:
    model = onnx.load(tiny_engine, load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert sum(np.prod(t.dims) for t in outside) > 30_000
    assert (tiny_engine.parent / "engine.onnx.data").is_file()


def test_a_row_of_zeros_is_normed_whatever_the_epsilon(family_engine: Callable[[str], Path]) -> None:
    # Its padding token's embedding is all zeros, and its epsilon 1e-8, which an optimizer may take for nothing.
    path = family_engine("helium") / "engine.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    normed = [{one.name: one.f for one in node.attribute} for node in graph.node if node.op_type == "RMSNormalization"]
    assert {attributes["epsilon"] for attributes in normed} == {float(np.float32(1e-8))}
    assert len(graph.input) == len(read_engine_file(path).dims.inputs())
