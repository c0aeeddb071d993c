"""The graph for TensorRT is the exported one, but for what its parser is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from onnxruntime import InferenceSession

from ht_export.tensorrt.graph import write_for_tensorrt
from plugins.tensorrt_plugin import NAME, NAMESPACE, VERSION
from runtime.bundle.engine_file import read_engine_file


def load(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def take_attributes(nodes: Any, wanted: Callable[[str], bool]) -> list[tuple[str, dict[str, Any]]]:
    """Remove the attributes of such names; return the operator and the attributes of each node that had any."""
    taken = []
    for node in nodes:
        found = [attribute for attribute in node.attribute if wanted(attribute.name)]
        for attribute in found:
            node.attribute.remove(attribute)
        if found:
            taken.append((node.op_type, {a.name: onnx.helper.get_attribute_value(a) for a in found}))
    return taken


def test_every_tree_attention_names_the_plugin_and_nothing_else_is_changed(graphs: Path) -> None:
    marked = load(graphs / "tensorrt.onnx")
    plugin = {"plugin_namespace": NAMESPACE.encode(), "plugin_version": VERSION.encode()}
    layers = read_engine_file(graphs / "engine.onnx").dims.num_layers
    assert take_attributes(marked.graph.node, lambda name: name.startswith("plugin_")) == [(NAME, plugin)] * layers
    assert marked == load(graphs / "engine.onnx")


def test_the_number_of_plugin_nodes_is_returned(graphs: Path, tmp_path: Path) -> None:
    source = graphs / "engine.onnx"
    dims = read_engine_file(source).dims
    for plugin, count in ((True, 4), (False, 0)):
        assert write_for_tensorrt(source, tmp_path / "t", dims, plugin=plugin, decomposable=False) == count
    assert load(tmp_path / "t") == load(graphs / "engine.onnx")


def test_the_checker_accepts_the_marked_graph(graphs: Path) -> None:
    onnx.checker.check_model(str(graphs / "tensorrt.onnx"), full_check=True)


@pytest.mark.parametrize("runtime", [InferenceSession, ReferenceEvaluator])
def test_other_runtimes_compute_the_same_bits_from_the_marked_graph(
    runtime: type[InferenceSession] | type[ReferenceEvaluator], graphs: Path, feeds: dict[str, dict[str, np.ndarray]]
) -> None:
    assert {"prompt", "tree", "plain"} <= feeds.keys()
    assert all(feeds["tree"][f"pseudo_parent_{k}"].size for k in (1, 2, 3))
    plain, marked = (runtime(str(graphs / name)) for name in ("engine.onnx", "tensorrt.onnx"))
    names = [binding.name for binding in read_engine_file(graphs / "engine.onnx").dims.outputs()]
    for case, feed in feeds.items():
        for name, found, expected in zip(names, marked.run(names, feed), plain.run(names, feed), strict=True):
            assert np.isfinite(expected).all()
            bits = f"u{expected.itemsize}"
            np.testing.assert_array_equal(found.view(bits), expected.view(bits), err_msg=f"{name}, {case}", strict=True)


def test_attention_that_may_be_written_out_is_for_tensorrt_only(graphs: Path) -> None:
    path = graphs / "decomposable.onnx"
    dims = read_engine_file(graphs / "engine.onnx").dims
    assert write_for_tensorrt(graphs / "engine.onnx", path, dims, plugin=True, decomposable=True) == 4
    with pytest.raises(onnx.checker.ValidationError, match="Unrecognized attribute: TRT_decomposable"):
        onnx.checker.check_model(str(path))
    model = load(path)
    (function,) = model.functions
    assert take_attributes(function.node, "TRT_decomposable".__eq__) == [("Attention", {"TRT_decomposable": 1})]
    assert model == load(graphs / "tensorrt.onnx")
