"""`ht-parity` on engines that are right and on broken ones: rotary embedding, mask, cache, weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ht_export.parity.cli import main
from runtime.engine_file import FileRecord, engine_file_path, read_engine_file

Break = Callable[[onnx.ModelProto], None]


@pytest.fixture
def run(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, dict]]:
    """Runs the command on an engine; returns its status, what it printed, and the JSON."""

    def run(engine: Path, *options: str) -> tuple[int, str, dict]:
        report = tmp_path / "report.json"
        places = [str(tiny_checkpoint), str(engine), "--transfer", str(tiny_transfer), "--json", str(report)]
        status = main([*places, "--max-new-tokens", "16", "--threads", "1", *options])
        return status, capsys.readouterr().out, json.loads(report.read_text())

    return run


def broken(engine: Path, folder: Path, change: Break) -> Path:
    """Return a copy of an engine whose portable graph is changed, described as if it had been exported so."""
    copy = folder / "broken"
    shutil.copytree(engine.parent, copy)
    path = copy / engine.name
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    about = read_engine_file(path)
    # The graph lowered for the CPU is another, and not broken.
    replace(about, graph=FileRecord.of(path), cpu_graph=None).write(engine_file_path(path))
    return path


def attention(model: onnx.ModelProto, layer: int) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == "TreeAttention"][layer]


def insert_before(model: onnx.ModelProto, node: onnx.NodeProto, *new: onnx.NodeProto) -> None:
    for one in new:
        model.graph.node.insert(list(model.graph.node).index(node), one)


def wrong_rotary(model: onnx.ModelProto) -> None:
    """Rotate layer 2's keys the other way."""
    producer = {output: node for node in model.graph.node for output in node.output}
    rotary = producer[attention(model, 2).input[1]]
    assert rotary.op_type == "RotaryEmbedding"
    insert_before(model, rotary, helper.make_node("Neg", [rotary.input[2]], ["turned"]))
    rotary.input[2] = "turned"


def mask_off_by_one(model: onnx.ModelProto) -> None:
    """Let rows of layer 1 see the mask of the row before."""
    node = attention(model, 1)
    for name, values in (("last", [-1]), ("zero", [0]), ("end", [2**31]), ("axis", [1])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype=np.int64), name))
    # Concat([last row, all others]); a row must see something, so that the diagonal stays.
    insert_before(model, node, helper.make_node("Slice", [node.input[6], "last", "end", "axis"], ["m_last"]))
    insert_before(model, node, helper.make_node("Slice", [node.input[6], "zero", "last", "axis"], ["m_rest"]))
    insert_before(model, node, helper.make_node("Concat", ["m_last", "m_rest"], ["m_rolled"], axis=1))
    insert_before(model, node, helper.make_node("Or", ["m_rolled", node.input[6]], ["m_shifted"]))
    node.input[6] = "m_shifted"


def swapped_cache(model: onnx.ModelProto) -> None:
    """Give layer 1 the keys of layer 2's cache."""
    attention(model, 1).input[3] = "key_cache_2"


def cache_one_row_short(model: onnx.ModelProto) -> None:
    """Hide the newest row of the cache from layer 3."""
    node = attention(model, 3)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, dtype=np.int64), "one_row"))
    insert_before(model, node, helper.make_node("Sub", [node.input[5], "one_row"], ["shorter"]))
    node.input[5] = "shorter"


def wrong_scale(model: onnx.ModelProto) -> None:
    (scale,) = (a for a in attention(model, 0).attribute if a.name == "scale")
    scale.f *= 1.1


def wrong_head(model: onnx.ModelProto) -> None:
    """Scale the logits."""
    (node,) = (node for node in model.graph.node if "logits" in node.output)
    node.output[0] = "unscaled"
    model.graph.initializer.append(helper.make_tensor("factor", TensorProto.FLOAT, [], [1.01]))
    model.graph.node.append(helper.make_node("Mul", ["unscaled", "factor"], ["logits"]))


def test_an_engine_that_is_right(tiny_engine: Path, run: Callable, tmp_path: Path) -> None:
    status, printed, report = run(tiny_engine, "--per-layer", "--report", str(tmp_path / "r.html"))
    assert status == 0
    assert report["holds"]
    assert report["faults"] == []
    assert [stage["name"] for stage in report["stages"]] == [
        "PyTorch reference",
        "ONNX reference evaluator",
        "ONNX Runtime",
        "ONNX Runtime, lowered for the CPU",
    ]
    for stage in report["stages"]:
        names = {one["output"] for one in stage["outputs"]}
        assert names >= {"keys", "values", "logits"}
        assert {one["layer"] for one in stage["outputs"]} == {0, 1, 2, 3, None}
        if stage["against"] == "PyTorch reference":
            assert names == {"keys", "values", "attention", "logits", "draft_logits"}
    text = report["text"]
    assert text["same_as_transformers"] == text["same_as_plain"] == len(text["prompts"]) == 3
    assert text["agreement_with_transformers"] == 1.0
    assert all(0 < one["self_error"] < 1e-4 for one in text["prompts"])
    assert "Parity holds." in printed
    assert "## ONNX Runtime, by layer" in printed
    page = (tmp_path / "r.html").read_text()
    assert "Parity holds." in page
    assert page.count("<table>") == 6


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (wrong_rotary, "layer 2, keys"),
        (mask_off_by_one, "layer 1, attention"),
        (swapped_cache, "layer 1, attention"),
        (cache_one_row_short, "layer 3, attention"),
        (wrong_scale, "layer 0, attention"),
        (wrong_head, "logits"),
    ],
)
def test_a_broken_graph_is_caught_and_the_layer_named(
    tiny_engine: Path, tmp_path: Path, run: Callable, change: Break, place: str
) -> None:
    status, printed, report = run(broken(tiny_engine, tmp_path, change), "--no-evaluator")
    assert status == 1
    assert not report["holds"]
    by_name = {stage["name"]: stage for stage in report["stages"]}
    assert by_name["PyTorch reference"]["wrong"] is None
    assert by_name["ONNX reference evaluator"]["skipped"] == "--no-evaluator was given"
    assert f"WRONG: ONNX Runtime parts from PyTorch reference at {place}: " in printed
