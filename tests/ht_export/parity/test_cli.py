"""`ht-parity` on engines that are right and on broken ones: rotary embedding, mask, cache, weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ht_export.export import UNTRAINED, ExportSettings, export
from ht_export.model.checkpoint import load_base_model
from ht_export.model.transfer import TransferFile, save_transfer_layers
from ht_export.parity import run as run_module
from ht_export.parity.cli import main
from runtime.bundle.engine_file import FileRecord, Limits, PlanFile, read_engine_file
from runtime.bundle.places import engine_file_path
from runtime.errors import InputError
from tests.conftest import random_transfer, save_checkpoint, tiny_llama
from tests.families import tiny_model

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


def test_drafts_with_a_head_of_their_own_hold_stage_by_stage(
    draft_head_engine: Path, draft_head_transfer: Path, run: Callable
) -> None:
    status, _, report = run(draft_head_engine, "--transfer", str(draft_head_transfer))
    assert (status, report["faults"]) == (0, [])
    compared = [one["output"] for stage in report["stages"][1:] for one in stage["outputs"]]
    assert compared.count("draft_logits") == 3


def test_a_graph_in_half_precision_is_within_what_rounding_makes(half_engine: Path, run: Callable) -> None:
    status, _, report = run(half_engine)
    assert status == 0
    assert report["conditions"]["precision"] == "float16"
    (stage,) = (stage for stage in report["stages"] if stage["name"] == "ONNX Runtime")
    assert 1e-5 < max(one["relative"] for one in stage["outputs"]) < stage["tolerance"] == 2e-2


def test_windows_and_soft_caps_hold_stage_by_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_checkpoint(tmp_path / "model", tiny_model("gemma2"))
    out = tmp_path / "engine.onnx"
    export(str(checkpoint), UNTRAINED, out, ExportSettings(chunk=16), lambda _: nullcontext(lambda _: None))
    # Untrained transfer layers need not be given.
    assert main([str(checkpoint), str(out), "--max-new-tokens", "8", "--threads", "1"]) == 0
    assert "Parity holds." in capsys.readouterr().out


def test_a_report_without_text(tiny_engine: Path, run: Callable, tmp_path: Path) -> None:
    status, printed, report = run(
        tiny_engine, "--max-new-tokens", "0", "--no-evaluator", "--report", str(tmp_path / "r.md")
    )
    assert status == 0
    assert report["text"] is None
    assert (tmp_path / "r.md").read_text() == printed
    assert "## Text" not in printed


def test_a_plan_without_a_gpu_is_said_not_to_run(
    tiny_engine: Path, tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InputError("no NVIDIA GPU can be used here")

    copy = tmp_path / "plan"
    shutil.copytree(tiny_engine.parent, copy)
    about = read_engine_file(copy / "engine.onnx")
    limits = Limits(max_batch=1, max_context=64, max_rows=8, chunk=16)
    plan = PlanFile("tensorrt-rtx", "1.7", ((8, 0),), "native", None, limits, {}, about.graph, {})
    replace(about, plan=plan, weights=None, cpu_graph=None).write(copy / "engine.json")
    monkeypatch.setattr(run_module, "Generator", refuse)
    status, printed, report = run(copy / "engine.onnx")
    assert status == 0
    assert [stage["skipped"] for stage in report["stages"]] == [None, "no NVIDIA GPU can be used here"]
    assert "TensorRT (tensorrt-rtx 1.7): not run, no NVIDIA GPU can be used here" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "2"], "--count is of a file of prompts"),
        (["--max-new-tokens", "-1"], "--max-new-tokens must be"),
        (["--threads", "0"], "--threads must be"),
        (["--report", "r.pdf"], r"--report r\.pdf: its name must end in \.md or \.html"),
        (["--report", "PLAIN/r.md"], "cannot write"),
        (["--json", "PLAIN/r.json"], "cannot write"),
        (["--json", "ENGINE"], r"engine\.json is read here, and what is written would replace it"),
        (["--prompts", "nowhere.jsonl"], "no prompts file at nowhere.jsonl"),
        (["--transfer", "nowhere"], "no transfer layers at nowhere"),
        (["--transfer", "OTHER"], "was made with other transfer layers; give them with --transfer"),
    ],
)
def test_a_users_mistake_is_one_line(
    tiny_checkpoint: Path,
    tiny_transfer: Path,
    tiny_engine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "file").write_text("")
    other = tmp_path / "other.safetensors"
    base = load_base_model(str(tiny_checkpoint))
    save_transfer_layers(other, random_transfer((3, 1, 3), seed=7), TransferFile(base.identity()))
    places = {"PLAIN": str(tmp_path / "file"), "OTHER": str(other), "ENGINE": str(tiny_engine.with_suffix(".json"))}
    for name, place in places.items():
        options = [option.replace(name, place) for option in options]
    given = [] if "--transfer" in options else ["--transfer", str(tiny_transfer)]
    assert main([str(tiny_checkpoint), str(tiny_engine), *given, *options]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("ht-parity: error: "))
    assert re.search(message, line)


def test_an_engine_of_another_model(tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_checkpoint(tmp_path / "other", tiny_llama(seed=5))
    assert main([str(other), str(tiny_engine)]) == 1
    assert "no transfer layers are shipped" in capsys.readouterr().err
    transfer = tmp_path / "t.safetensors"
    save_transfer_layers(transfer, random_transfer((1,)), TransferFile(load_base_model(str(other)).identity()))
    assert main([str(other), str(tiny_engine), "--transfer", str(transfer)]) == 1
    assert "has other weights" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"no graph", b""])
def test_a_graph_that_cannot_be_read_is_one_line(
    tiny_checkpoint: Path,
    tiny_transfer: Path,
    tiny_engine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
) -> None:
    shutil.copytree(tiny_engine.parent, tmp_path / "engine")
    engine = tmp_path / "engine" / tiny_engine.name
    # Not the graph that the generator runs.
    engine.write_bytes(content or b"\x08\x0a")
    replace(read_engine_file(engine), graph=FileRecord.of(engine)).write(engine_file_path(engine))
    assert main([str(tiny_checkpoint), str(engine), "--transfer", str(tiny_transfer)]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("ht-parity: error: "))
    assert re.search(r"cannot run .*engine\.onnx: .*; export the engine again", line)
