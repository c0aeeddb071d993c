"""Graphs that somebody else wrote, in ONNX Runtime: whatever it says of them is one error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime import EngineError, EngineFileError, Generator
from runtime.bundle.engine_file import FileRecord, read_engine_file
from runtime.bundle.places import engine_file_path
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.rows import prompt_rows
from tests.passes import run_one

GRAPH, LOWERED = "engine.onnx", "engine.cpu.onnx"
Change = Callable[[onnx.ModelProto], None]


def changed(engine: Path, name: str, change: Change) -> Path:
    """Change a graph of `engine` and its record; without a lowered graph it is the engine's own that runs."""
    path = engine.with_name(name)
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    about = read_engine_file(engine)
    record = FileRecord.of(path)
    about = replace(about, cpu_graph=record) if name == LOWERED else replace(about, graph=record, cpu_graph=None)
    about.write(engine_file_path(engine))
    return engine


def refused(engine: Path, message: str) -> None:
    """Check that an engine cannot be loaded, or cannot answer."""
    with pytest.raises((EngineFileError, EngineError), match=message) as raised:
        Generator(engine, threads=1, adapt=False).generate("a", max_new_tokens=3)
    assert str(raised.value).isprintable()


def future_version(model: onnx.ModelProto) -> None:
    model.ir_version = 255


def one_weight_twice(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(next(one for one in model.graph.initializer if one.data_location))


def input_of_three_dimensions(model: onnx.ModelProto) -> None:
    (value,) = (value for value in model.graph.input if value.name == "value_cache_1")
    del value.type.tensor_type.shape.dim[0]


def mask_of_numbers(model: onnx.ModelProto) -> None:
    (value,) = (value for value in model.graph.input if value.name == "tree_mask")
    value.type.tensor_type.elem_type = TensorProto.INT64
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "tree_mask":
                node.input[index] = "mask"
    model.graph.node.insert(0, helper.make_node("Cast", ["tree_mask"], ["mask"], to=TensorProto.BOOL))


def another_name(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "a\x1b[2J\nb"
    (node,) = (node for node in model.graph.node if "logits" in node.output)
    node.output[0] = model.graph.output[0].name


def token_beyond_the_table(model: onnx.ModelProto) -> None:
    """Let the graph look for a token that its embeddings do not have."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(10**6, dtype=np.int64), "far"))
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "input_ids" and node.op_type == "Gather":
                node.input[index] = "beyond"
    model.graph.node.insert(0, helper.make_node("Add", ["input_ids", "far"], ["beyond"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (future_version, r"ONNX Runtime \S+ cannot load .*: .*Unsupported model IR version: 255"),
        (one_weight_twice, "and its weights do not go together .*; export it again"),
        # The portable graph has other nodes, which ONNX Runtime knows more about.
        (input_of_three_dimensions, r"describes \(value_cache_1\)|cannot load .*: .*must have (the )?same rank"),
        (mask_of_numbers, r"does not have the graph its engine\.json describes \(tree_mask\)"),
        (another_name, r"does not have the graph its engine\.json describes \(a\ufffd\[2J\)"),
        (token_beyond_the_table, r"ONNX Runtime cannot run .*: .*indices element out of data bounds.*; free mem"),
    ],
)
@pytest.mark.parametrize("name", [GRAPH, LOWERED])
def test_a_graph_that_cannot_run_is_one_error(engine_copy: Path, name: str, change: Change, message: str) -> None:
    refused(changed(engine_copy, name, change), message)


@pytest.mark.parametrize("name", [GRAPH, LOWERED])
def test_a_graph_whose_outputs_are_of_another_size_is_one_error(engine_copy: Path, name: str) -> None:
    def one_row(model: onnx.ModelProto) -> None:
        (node,) = (node for node in model.graph.node if "logits" in node.output)
        node.output[0] = "all_logits"
        for part, values in (("first", [0]), ("next", [1]), ("axis", [1])):
            model.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype=np.int64), part))
        model.graph.node.append(helper.make_node("Concat", ["all_logits", "all_logits"], ["logits"], axis=1))

    refused(changed(engine_copy, name, one_row), "ONNX Runtime cannot run .*export the engine again")


def test_what_is_not_the_graphs_fault_goes_through(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OnnxRuntimeEngine, "_check_shapes", interrupted)
    engine = OnnxRuntimeEngine(tiny_engine, read_engine_file(tiny_engine).dims, 1)
    with pytest.raises(KeyboardInterrupt):
        run_one(engine, prompt_rows([3], engine.dims.join_order, 0), engine.new_slot())


@pytest.mark.parametrize("name", ["engine.onnx", "engine.cpu.onnx"])
def test_nothing_is_printed_of_a_graph_that_fails(
    engine_copy: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    refused(changed(engine_copy, name, token_beyond_the_table), "ONNX Runtime cannot run")
    assert capfd.readouterr() == ("", "")
