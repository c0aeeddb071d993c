"""Products in whole numbers: what they compute, and that no row depends on those beside it."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ht_export.quantize.by_row import LARGEST_ALIKE
from ht_export.quantize.precision import STORED
from ht_export.quantize.rotate import ALIKE
from ht_export.quantize.weights import quantise
from runtime.engines.byte_sums import EXACT_SUMS, byte_sums_are_exact


def product(weights: np.ndarray, twice: bool = False, alike: bool = False) -> onnxruntime.InferenceSession:
    """Return a session of rows times weights [K, N], in whole numbers; `alike`: of the rows that a norm makes of those
    given, as in a layer of a rotated stream.
    """
    names, inputs = ["y", "z"] if twice else ["y"], weights.shape[0]
    source = "normed" if alike else "x"
    nodes = [helper.make_node("MatMul", [source, "w"], [name]) for name in names]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "R", weights.shape[1]]) for name in names]
    if alike:
        norm = helper.make_node("RMSNormalization", ["x", "ones"], ["normed"])
        norm.metadata_props.add(key=ALIKE, value="true")
        nodes = [norm, *nodes, helper.make_node("Add", ["x", "x"], ["stream"])]
        outputs.append(helper.make_tensor_value_info("stream", TensorProto.FLOAT, ["B", "R", inputs]))
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "R", inputs])],
        outputs,
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.ones(inputs, np.float32), "ones")],
    )
    model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    for node in list(model.graph):
        if node.op_type == "MatMul":
            STORED["int8"].replace(model.graph, node, "w", weights.T, None)
    model.opset_imports.update(STORED["int8"].opsets)
    model.ir_version = 11
    made = ir.serde.serialize_model(model)
    if twice:
        counts = Counter(node.op_type for node in made.graph.node)
        by_row = {"Abs": 1, "ReduceMax": 1, "Div": 1, "Mul": 2}
        others = {"RMSNormalization": 1, "Add": 1} if alike else by_row
        assert counts == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 2, **others}
    options = onnxruntime.SessionOptions()
    if not byte_sums_are_exact():
        options.add_session_config_entry(EXACT_SUMS, "1")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [1, R, K] of very different sizes, and weights [K, N]."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, inputs, outputs = (draw(st.integers(1, most)) for most in (40, 130, 40))
    sizes = 10.0 ** random.integers(-6, 7, (1, rows, 1))
    return (random.standard_normal((1, rows, inputs)) * sizes).astype(np.float32), random.standard_normal(
        (inputs, outputs)
    ).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_products_are_those_of_rounded_rows_and_rounded_weights(case: tuple[np.ndarray, np.ndarray]) -> None:
    rows, weights = case
    (found,) = product(weights).run(None, {"x": rows})
    largest = np.abs(rows).max(-1, keepdims=True)
    scales = np.abs(weights).max(0) / 127
    # Either neighbour of what lies halfway between them.
    whole_rows, whole_weights = np.rint(rows / largest * 127), np.rint(weights / scales)
    exact = (whole_rows @ whole_weights) * (largest / 127) * scales
    step = np.abs(whole_weights).max() * (largest / 127) * scales
    assert (np.abs(found - exact) <= 2.01 * step + 1e-5 * np.abs(exact)).all()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_rows_that_are_alike_are_rounded_with_one_scale_and_cut(case: tuple[np.ndarray, np.ndarray]) -> None:
    rows, weights = case
    (found,) = product(weights, alike=True).run(["y"], {"x": rows})
    normed = rows / np.sqrt(np.square(rows.astype(np.float64)).mean(-1, keepdims=True) + 1e-5)
    scale, scales = LARGEST_ALIKE / 127, np.abs(weights).max(0) / 127
    whole_rows, whole_weights = np.rint(normed / scale).clip(-128, 127), np.rint(weights / scales)
    exact = (whole_rows @ whole_weights) * scale * scales
    step = np.abs(whole_weights).max() * scale * scales
    assert (np.abs(found - exact) <= 2.01 * step + 1e-5 * np.abs(exact)).all()


@settings(max_examples=40, deadline=None)
@given(cases(), st.booleans(), st.data())
def test_a_row_is_the_same_bits_whatever_runs_beside_it(
    case: tuple[np.ndarray, np.ndarray], alike: bool, data: st.DataObject
) -> None:
    rows, weights = case
    session = product(weights, alike=alike)
    (together,) = session.run(["y"], {"x": rows})
    for row in range(rows.shape[1]):
        (alone,) = session.run(["y"], {"x": rows[:, row : row + 1]})
        np.testing.assert_array_equal(alone[0, 0], together[0, row])
    chosen = data.draw(st.lists(st.integers(0, rows.shape[1] - 1), min_size=1))
    (some,) = session.run(["y"], {"x": rows[:, chosen]})
    np.testing.assert_array_equal(some[0], together[0, chosen])
    (stacked,) = session.run(["y"], {"x": np.swapaxes(rows, 0, 1)})
    np.testing.assert_array_equal(stacked[:, 0], together[0])


def test_rows_of_nothing_but_zeros_stay_so_and_harm_no_other() -> None:
    weights = np.random.default_rng(0).standard_normal((70, 9)).astype(np.float32)
    rows = np.random.default_rng(1).standard_normal((1, 5, 70)).astype(np.float32)
    rows[0, 2] = 0
    (found,) = product(weights).run(None, {"x": rows})
    assert not found[0, 2].any()
    assert np.isfinite(found).all()
    (others,) = product(weights).run(None, {"x": rows[:, [0, 1, 3, 4]]})
    np.testing.assert_array_equal(found[0, [0, 1, 3, 4]], others[0])


def test_an_output_without_weights_is_zero() -> None:
    weights = np.zeros((40, 3), dtype=np.float32)
    weights[:, 1] = 1
    (found,) = product(weights).run(None, {"x": np.ones((1, 1, 40), dtype=np.float32)})
    np.testing.assert_allclose(found, [[[0, 40, 0]]], rtol=1e-6)


@pytest.mark.parametrize("alike", [False, True])
def test_products_of_the_same_rows_round_them_once(alike: bool) -> None:
    weights = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    one, other = product(weights, twice=True, alike=alike).run(["y", "z"], {"x": np.ones((1, 2, 32), dtype=np.float32)})
    np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def quantised(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny engine's graph in whole numbers."""
    out = tmp_path_factory.mktemp("int8") / "engine.onnx"
    quantise(tiny_engine, out, STORED["int8"])
    return out


def test_every_product_with_weights_is_in_whole_numbers(tiny_engine: Path, quantised: Path) -> None:
    before, after = (onnx.load(path, load_external_data=False).graph for path in (tiny_engine, quantised))
    counts = Counter(node.op_type for node in after.node)
    assert counts["MatMul"] == 0
    assert counts["MatMulIntegerToFloat"] == Counter(node.op_type for node in before.node)["MatMul"] > 16
    types = Counter(one.data_type for one in after.initializer if len(one.dims) == 2)
    # The embedding alone stays as it is.
    assert types == {TensorProto.INT8: counts["MatMulIntegerToFloat"], TensorProto.FLOAT: 1}
    onnx.checker.check_model(str(quantised))
