"""Graphs in half precision, widened so that any runtime computes them in float32."""

from pathlib import Path

import onnx
import onnxruntime
import pytest

from ht_export.precision import write_widened
from ht_export.quantise import quantise
from ht_export.storage import STORED_IN_PLANS
from runtime.engine_file import read_engine_file
from runtime.engines.onnxruntime import use_little_memory


@pytest.mark.parametrize(
    ("precision", "fused"), [("fp16", None), ("int8", "MatMulNBits"), ("int4", "MatMulNBits"), ("fp8", None)]
)
def test_a_small_session_leaves_weights_as_they_are_stored(
    half_engine: Path, tmp_path: Path, precision: str, fused: str | None
) -> None:
    """What ONNX Runtime holds once it has loaded a graph is what it would write of it."""
    graph, widened = half_engine, half_engine.with_name("widened.onnx")
    if precision != "fp16":
        graph, widened = tmp_path / "stored.onnx", tmp_path / "widened.onnx"
        quantise(half_engine, graph, STORED_IN_PLANS[precision])
    options = onnxruntime.SessionOptions()
    disabled = use_little_memory(options)
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    try:
        write_widened(graph, widened)
        onnxruntime.InferenceSession(widened, options, ["CPUExecutionProvider"], disabled_optimizers=disabled)
    finally:
        widened.unlink()
    loaded = onnx.load(tmp_path / "loaded.onnx", load_external_data=False).graph
    hidden = read_engine_file(half_engine).dims.hidden_size
    wide = [
        one.name
        for one in loaded.initializer
        if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) == 2 and min(one.dims) >= hidden
    ]
    assert not wide
    operators = {node.op_type for node in loaded.node}
    assert fused in operators if fused else "MatMulNBits" not in operators
