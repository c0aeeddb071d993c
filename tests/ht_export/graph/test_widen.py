"""Graphs in half precision, widened so that any runtime computes them in float32."""

from pathlib import Path

import onnx
import onnxruntime
import pytest

from ht_export.graph.widen import write_widened
from ht_export.quantize.precision import STORED_IN_PLANS
from ht_export.quantize.weights import quantise
from runtime.bundle.engine_file import read_engine_file
from runtime.engines.onnxruntime import use_little_memory


@pytest.mark.parametrize("precision", ["fp16", *STORED_IN_PLANS])
def test_a_small_session_holds_weights_in_float32_one_by_one(half_engine: Path, tmp_path: Path, precision: str) -> None:
    """The graph that ONNX Runtime writes once it has loaded one shows what it holds, and the order that it runs in."""
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
    matrices = [one for one in loaded.initializer if len(one.dims) == 2 and min(one.dims) >= hidden]
    assert not [one.name for one in matrices if one.data_type == onnx.TensorProto.FLOAT]
    names = {one.name for one in matrices}
    first_use = {name: place for place, node in reversed([*enumerate(loaded.node)]) for name in node.input}
    made = [
        (place, node) for place, node in enumerate(loaded.node) if names & {*node.input} and node.op_type != "Gather"
    ]
    assert {node.op_type for _, node in made} >= {"Cast" if precision == "fp16" else "DequantizeLinear"}
    for place, node in made:
        between = loaded.node[place + 1 : first_use[node.output[0]]]
        assert len(between) <= 2, (node.name, [other.op_type for other in between])
