"""Quantised weights of plans: what is stored, what ONNX says that it means, and which products have it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ht_export.cli import build_parser
from ht_export.quantize.formats import PLAN_BLOCK
from ht_export.quantize.gptq import round_calibrated
from ht_export.quantize.grid import Grid
from ht_export.quantize.precision import CHOICES, STORED_IN_PLANS, storage_of
from ht_export.quantize.weights import quantise
from runtime.errors import InputError
from tests.ht_export.quantize.test_gptq import correlated


def product_with(weights: np.ndarray, precision: str, ends: np.ndarray | None = None) -> onnx.ModelProto:
    """Return a model of one product x W in half precision, weights [N, K] stored as a plan's are."""
    rows = ir.val("x", ir.DataType.FLOAT16, ["R", weights.shape[1]])
    other = ir.val("w", ir.DataType.FLOAT16, list(weights.shape[::-1]))
    product = ir.node("MatMul", [rows, other])
    output = product.outputs[0]
    output.name, output.dtype, output.shape = "y", ir.DataType.FLOAT16, ir.Shape(["R", len(weights)])
    graph = ir.Graph([rows], product.outputs, nodes=[product], opset_imports={"": 23}, name="product")
    STORED_IN_PLANS[precision].replace(graph, product, "w", weights, ends)
    return ir.to_proto(ir.Model(graph, ir_version=10))


def read_back(model: onnx.ModelProto, size: int) -> np.ndarray:
    """Return the weights [N, K] that ONNX Runtime multiplies by."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.eye(size, dtype=np.float16)})
    return found.T.astype(np.float32)


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Weights [N, K] with whole blocks, of magnitudes that layers have, some rows zero."""
    rows, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = rng.standard_normal((rows, blocks * PLAN_BLOCK)) * draw(st.sampled_from([1e-3, 0.02, 1.0, 30.0]))
    weights[draw(st.lists(st.integers(0, rows - 1), max_size=2))] = 0
    return weights.astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(matrices(), st.sampled_from(sorted(STORED_IN_PLANS)))
def test_weights_are_what_was_stored_but_for_half_a_step(weights: np.ndarray, precision: str) -> None:
    model = product_with(weights, precision)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["DequantizeLinear", "MatMul"]
    # TensorRT takes no others.
    assert (onnx.numpy_helper.to_array(model.graph.initializer[1]) > 0).all()
    found = read_back(model, weights.shape[1])
    largest = abs(weights)
    if precision == "int4":
        blocks = largest.reshape(len(weights), -1, PLAN_BLOCK).max(axis=-1)
        step = np.repeat(blocks, PLAN_BLOCK, axis=1) / 7
    elif precision == "int8":
        step = largest.max(axis=1, keepdims=True) / 127
    else:
        # Three bits after the first; of the smallest numbers fewer.
        step = np.maximum(largest / 8, largest.max(axis=1, keepdims=True) * 2**-14)
    # And the last bits of scale and product, in half precision.
    assert (abs(found - weights) <= 0.51 * step + 1e-3 * largest + 1e-6).all()
    assert not found[weights == 0].any()


def test_what_is_stored_has_the_bits_that_its_name_says() -> None:
    weights = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    types = {"int8": onnx.TensorProto.INT8, "int4": onnx.TensorProto.INT4, "fp8": onnx.TensorProto.FLOAT8E4M3FN}
    sizes = {"int8": 6 * 128, "int4": 6 * 64, "fp8": 6 * 128}
    for precision, kind in types.items():
        stored, scales = product_with(weights, precision).graph.initializer
        assert (stored.data_type, len(stored.raw_data)) == (kind, sizes[precision])
        assert (list(stored.dims), scales.data_type) == ([128, 6], onnx.TensorProto.FLOAT16)
        assert list(scales.dims) == ([2, 6] if precision == "int4" else [6])


def test_an_odd_number_of_columns_is_packed_too() -> None:
    weights = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    found = read_back(product_with(weights, "int4"), 64)
    assert np.corrcoef(found.ravel(), weights.ravel())[0, 1] > 0.98


def test_numbers_too_small_for_a_scale_in_half_precision_keep_their_digits() -> None:
    weights = np.full((1, 64), 3e-4, dtype=np.float32)
    assert abs(read_back(product_with(weights, "fp8"), 64) - weights).max() < 2**-4 * 3e-4
    # Far below what half precision has: zero, and no infinity.
    nothing = np.full((1, 64), 1e-12, dtype=np.float32)
    for precision in STORED_IN_PLANS:
        assert not read_back(product_with(nothing, precision), 64).any()


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_calibrated_weights_are_stored_as_they_were_rounded(precision: str) -> None:
    storage = STORED_IN_PLANS[precision]
    assert isinstance(storage.grid, Grid)
    weights = np.random.default_rng(2).standard_normal((24, 256)).astype(np.float32)
    rows = correlated(400, 256, 1)
    rounded, ends = round_calibrated(weights, (rows.T @ rows).astype(np.float64), storage.grid)
    stored = read_back(product_with(rounded, precision, ends), 256)
    np.testing.assert_allclose(stored, rounded, rtol=1e-3, atol=1e-6)
    nearest = read_back(product_with(weights, precision), 256)
    unseen = correlated(400, 256, 1)[::-1]
    errors = [float(np.square(unseen @ (found - weights).T).mean()) for found in (stored, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_weights_without_whole_blocks_stay_as_they_are(tiny_engine: Path, tmp_path: Path) -> None:
    # Products have inputs of 32, and one kind of 64.
    quantise(tiny_engine, tmp_path / "engine.onnx", STORED_IN_PLANS["int4"])
    graph = onnx.load(tmp_path / "engine.onnx", load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMul"]
    made = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert 0 < len(made) < len(products)
    sizes = {one.name: list(one.dims) for one in graph.initializer}
    assert all(sizes[node.input[0]][0] % PLAN_BLOCK == 0 for node in made)


def test_which_precisions_there_are() -> None:
    assert CHOICES == ("fp32", "fp16", "bf16", "int8", "int4", "fp8")
    # Written out there, so that --help needs no torch.
    (option,) = (action for action in build_parser()._actions if action.dest == "precision")
    assert set(option.choices or ()) == set(CHOICES)
    for precision in CHOICES:
        dtype, storage = storage_of(precision, is_plan=True)
        assert (storage is None) == (precision in ("fp32", "fp16", "bf16"))
        assert storage is None or str(dtype) == "torch.float16"
    with pytest.raises(InputError, match=r"fp8: ONNX Runtime has no products with such weights; use int8 or int4"):
        storage_of("fp8", is_plan=False)
    with pytest.raises(InputError, match="must be one of fp32, fp16, bf16, int8, int4, fp8, not fp4"):
        storage_of("fp4", is_plan=False)
