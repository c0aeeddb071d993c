"""Rotated and smoothed weights: the same model, with rows of which no number stands out."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ht_export.graph.trace import build_graph
from ht_export.model.dims import graph_dims
from ht_export.model.reference import HiddenTransferModel
from ht_export.quantize.prepare import prepare
from ht_export.quantize.products import products
from ht_export.quantize.rotate import Rotation, behind_a_layers_norm, rotate
from ht_export.quantize.smooth import gated_rows, root_mean_squares, smooth
from ht_export.verify.passes import ReferenceEngine, check, difference, record
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.conftest import random_transfer
from tests.families import MODELS, tiny_model

# Families whose norms come before the layers, subtract no mean, and have a stream that nothing else uses.
ROTATED = ("llama", "llama, tied head", "llama, biases", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "granite",
           "arcee", "helium", "seed_oss", "ernie4_5", "gemma")  # fmt: skip
LEFT = ("gemma2", "gemma3", "olmo", "olmo2", "glm4", "exaone4", "stablelm", "starcoder2", "cohere")
TEXTS = [list(range(5, 45)), list(range(100, 130))]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200))
def test_a_rotation_is_orthogonal(size: int) -> None:
    rotation = Rotation(size)
    matrix = rotation.of_columns(np.eye(size, dtype=np.float32))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=2e-5)
    weights = np.random.default_rng(size).standard_normal((size, 3)).astype(np.float32)
    np.testing.assert_allclose(rotation.of_rows(weights), matrix.T @ weights, atol=1e-4)
    np.testing.assert_array_equal(matrix, Rotation(size).of_columns(np.eye(size, dtype=np.float32)))


def test_a_rotation_spreads_what_stands_out() -> None:
    row = np.zeros((1, 576), dtype=np.float32)
    row[0, 7] = 100
    assert np.abs(Rotation(576).of_columns(row)).max() < 20


def traced(name: str, folder: Path) -> tuple[Path, HiddenTransferModel]:
    """Write the graph of a tiny model of a family with random transfer layers; return its path and the reference."""
    torch.manual_seed(0)
    model = HiddenTransferModel(tiny_model(name), random_transfer((1, 1, 2))).eval()
    path = folder / "engine.onnx"
    ir.save(build_graph(model), path, external_data="engine.onnx.data")
    return path, model


@pytest.mark.parametrize("name", ROTATED + LEFT)
def test_a_prepared_graph_is_the_same_model(name: str, tmp_path: Path) -> None:
    assert name in MODELS
    path, model = traced(name, tmp_path)
    dims = graph_dims(model.base.config, model.transfer)
    out = tmp_path / "prepared.onnx"
    done = prepare(path, out, dims, TEXTS)
    assert done.rotated == (name in ROTATED)
    expected = record(ReferenceEngine(model))
    assert check(OnnxRuntimeEngine(out, dims), expected) < 1e-4
    # Something was changed where that is said.
    changed = "changed" in "".join(ir.load(out).graph.initializers)
    assert changed == (done.rotated or done.smoothed > 0)


@pytest.mark.parametrize("name", ROTATED)
def test_rows_that_a_layer_reads_behind_a_rotated_norm_are_alike(name: str, tmp_path: Path) -> None:
    path, model = traced(name, tmp_path)
    graph = ir.load(path)
    assert not any(behind_a_layers_norm(product.inputs[0]) for product, _ in products(graph.graph) if product.inputs[0])
    assert rotate(graph.graph, model.base.config.hidden_size)
    out = tmp_path / "rotated.onnx"
    ir.save(graph, out, external_data="rotated.onnx.data")
    alike = [
        product
        for product, _ in products(ir.load(out).graph)
        if product.inputs[0] is not None and behind_a_layers_norm(product.inputs[0])
    ]
    # Queries, keys and values; gate and up: each pair is one product or several of the same rows. Not the head.
    assert len({product.inputs[0] for product in alike}) == 2 * model.base.config.num_hidden_layers
    assert not any("logits" in str(product.outputs[0].name) for product in alike)


def test_what_a_rotation_does_not_allow_leaves_the_graph_as_it_was(tmp_path: Path) -> None:
    path, model = traced("gemma2", tmp_path)
    graph = ir.load(path)
    before = ir.serde.serialize_model(graph).SerializeToString()
    assert not rotate(graph.graph, model.base.config.hidden_size)
    assert ir.serde.serialize_model(graph).SerializeToString() == before


def test_rows_of_a_gated_layer_are_smoothed(tmp_path: Path) -> None:
    path, model = traced("llama", tmp_path)
    dims = graph_dims(model.base.config, model.transfer)
    graph = ir.load(path)
    names = gated_rows(graph.graph)
    assert len(names) == dims.num_layers
    before = root_mean_squares(path, dims, names, TEXTS)
    # One number stands out.
    told = {name: sizes * np.where(np.arange(len(sizes)) == 3, 1000, 1) for name, sizes in before.items()}
    smooth(graph.graph, told)
    out = tmp_path / "smooth.onnx"
    ir.save(graph, out, external_data="smooth.onnx.data")
    after = root_mean_squares(out, dims, names, TEXTS)
    for name in names:
        ratio = after[name] / before[name]
        assert ratio[3] < 0.1 * np.median(ratio)
    assert check(OnnxRuntimeEngine(out, dims), record(ReferenceEngine(model))) < 1e-4


def test_weights_in_half_precision_stay_in_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HiddenTransferModel(tiny_model("llama").to(torch.bfloat16), random_transfer((1, 1, 2))).eval()
    dims = graph_dims(model.base.config, model.transfer)
    path, out = tmp_path / "engine.onnx", tmp_path / "prepared.onnx"
    ir.save(build_graph(model, torch.float32, as_stored=True), path, external_data="engine.onnx.data")
    assert prepare(path, out, dims, TEXTS).rotated
    sizes = [file.with_name(f"{file.name}.data").stat().st_size for file in (path, out)]
    # A tied head has weights of its own now.
    assert sizes[1] < 1.3 * sizes[0]
    assert difference(OnnxRuntimeEngine(out, dims), record(OnnxRuntimeEngine(path, dims))) < 0.02
