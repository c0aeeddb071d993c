"""Sums of bytes: whether they saturate is seen once, and what follows from it."""

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from runtime.engines import byte_sums
from runtime.engines import onnxruntime as sessions
from runtime.engines.byte_sums import EXACT_SUMS, INPUTS, OUTPUTS, ROWS, byte_sums_are_exact, product_of_bytes


class MatMulIntegerToFloat(OpRun):
    """The product, of scales for all."""

    op_domain = "com.microsoft"

    def _run(self, rows, weights, row_scale, scale, zero_point):  # type: ignore[no-untyped-def]
        whole = (rows.astype(np.int64) - zero_point) @ weights.astype(np.int64)
        return ((whole * row_scale * scale).astype(np.float32),)


def test_the_graph_is_one_that_onnx_reads() -> None:
    model = onnx.load_from_string(product_of_bytes())
    onnx.checker.check_model(model)
    rows = np.full((3, INPUTS), 255, dtype=np.uint8)
    (found,) = ReferenceEvaluator(model, new_ops=[MatMulIntegerToFloat]).run(None, {"rows": rows})
    np.testing.assert_array_equal(found, np.full((3, OUTPUTS), INPUTS * 255 * 127, dtype=np.float32))


@pytest.mark.parametrize("rows", ROWS)
def test_sums_are_exact_with_the_option_on_any_processor(rows: int) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(EXACT_SUMS, "1")
    session = onnxruntime.InferenceSession(product_of_bytes(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"rows": np.full((rows, INPUTS), 255, dtype=np.uint8)})
    np.testing.assert_array_equal(found, np.full((rows, OUTPUTS), INPUTS * 255 * 127, dtype=np.float32))


def test_sums_that_saturate_in_one_shape_are_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    class Saturating:
        def __init__(self, *_: object, **__: object) -> None: ...

        def run(self, _: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            rows = len(feed["rows"])
            # Of two products 32,767 is left.
            return [np.full((rows, OUTPUTS), (INPUTS * 255 * 127) if rows == 1 else INPUTS // 2 * 32767, np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Saturating)
    assert not byte_sums_are_exact.__wrapped__()


@pytest.mark.parametrize(("graph", "exact", "asked"), [(True, True, 0), (True, False, 1), (False, False, 0)])
def test_the_option_is_asked_for_where_sums_saturate_and_a_graph_has_such(
    graph: bool,
    exact: bool,
    asked: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(product_of_bytes())
    monkeypatch.setattr(sessions, "byte_sums_are_exact", lambda: exact)
    if not graph:
        monkeypatch.setattr(sessions, "PRODUCT", b"no such operator")
    asked_for: list[str] = []

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, key: str, value: str) -> None:
            asked_for.append(key)
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    with caplog.at_level(logging.WARNING):
        sessions.open_session(path, ["CPUExecutionProvider"], 1, exact_sums=True)
    assert asked_for == [EXACT_SUMS] * asked
    assert len(caplog.records) == asked
    assert all("no VNNI" in record.message for record in caplog.records)


def test_the_answer_is_kept() -> None:
    assert byte_sums_are_exact() == byte_sums_are_exact()
    assert byte_sums.byte_sums_are_exact.cache_info().misses <= 1
