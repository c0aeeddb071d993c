"""Polygraphy, with which users of TensorRT look at graphs, on the exported graph and on the one marked for TensorRT."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from ht_export.tensorrt.graph import write_for_tensorrt
from plugins.tensorrt_plugin import NAMESPACE, VERSION
from runtime import bindings
from runtime.bindings import Binding
from runtime.bundle.engine_file import read_engine_file

pytest.importorskip("polygraphy")

from polygraphy.json import save_json

COMMAND = "import sys; from polygraphy.tools import main; sys.exit(main())"
# Offline, and with TensorRT for RTX wherever TensorRT is asked.
SETTINGS = {"POLYGRAPHY_AUTOINSTALL_DEPS": "0", "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
EITHER = pytest.mark.parametrize("graph", ["engine.onnx", "tensorrt.onnx"])


def polygraphy(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=folder,
        env=os.environ | SETTINGS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="session")
def folder(graphs: Path, feeds: dict[str, dict[str, np.ndarray]]) -> Path:
    """The graphs, with the inputs of all cases, those of a tree alone, and all with another token in the last."""
    save_json(list(feeds.values()), str(graphs / "inputs.json"))
    save_json([feeds["tree"]], str(graphs / "tree.json"))
    *others, last = feeds.values()
    altered = last | {bindings.INPUT_IDS: last[bindings.INPUT_IDS] ^ 1}
    save_json([*others, altered], str(graphs / "altered.json"))
    return graphs


def lint(folder: Path, graph: str) -> tuple[int, list[dict[str, str]], dict[str, list[str]]]:
    """Return the exit status, the findings, and the names of nodes that passed and failed.

    Inputs that lint makes up itself are no indices of rows, which it calls errors of the graph.
    """
    pytest.importorskip("onnx_graphsurgeon")
    result = polygraphy(folder, "check", "lint", graph, "--load-inputs", "tree.json", "--output", "lint.json")
    report = json.loads((folder / "lint.json").read_text(encoding="utf-8"))
    # Warnings of ONNX Runtime may be about the machine.
    findings = [e for e in report["lint_entries"] if (e["source"], e["level"]) != ("onnxruntime", "warning")]
    return result.returncode, findings, report["summary"]


@EITHER
def test_lint_finds_nothing(folder: Path, graph: str) -> None:
    status, findings, nodes = lint(folder, graph)
    names = [node.name for node in onnx.load(folder / graph, load_external_data=False).graph.node]
    assert (status, findings, nodes["failing"]) == (0, [], [])
    assert sorted(nodes["passing"]) == sorted(names)


def test_lint_finds_an_attribute_that_only_tensorrt_knows(folder: Path) -> None:
    dims = read_engine_file(folder / "engine.onnx").dims
    write_for_tensorrt(folder / "engine.onnx", folder / "decomposable.onnx", dims, plugin=True, decomposable=True)
    status, findings, _ = lint(folder, "decomposable.onnx")
    assert status == 1
    assert {finding["source"] for finding in findings} == {"onnx_checker", "onnxruntime"}
    assert {finding["message"] for finding in findings} == {
        "Unrecognized attribute: TRT_decomposable for operator Attention"
    }


@EITHER
def test_inspect_lists_the_bindings_of_the_contract(folder: Path, graph: str) -> None:
    result = polygraphy(folder, "inspect", "model", graph)
    found = re.findall(r"(\w+) \[dtype=(\w+), shape=(\(.*?\))\]", result.stdout)
    dims = read_engine_file(folder / "engine.onnx").dims
    assert [Binding(name, dtype, ast.literal_eval(shape)) for name, dtype, shape in found] == [
        *dims.inputs(),
        *dims.outputs(),
    ]
    assert f"---- {len(dims.inputs())} Graph Input(s) ----" in result.stdout
    assert f"---- {len(dims.outputs())} Graph Output(s) ----" in result.stdout


@EITHER
def test_inspect_shows_the_plugin_of_each_layer_where_it_is_marked(folder: Path, graph: str) -> None:
    shown = polygraphy(folder, "inspect", "model", graph, "--show", "layers", "attrs").stdout
    layers = read_engine_file(folder / "engine.onnx").dims.num_layers
    assert shown.count("[Op: TreeAttention]") == layers
    marks = layers if graph == "tensorrt.onnx" else 0
    assert shown.count(f".plugin_namespace = {NAMESPACE}\n") == marks
    assert shown.count(f".plugin_version = {VERSION}\n") == marks


@EITHER
def test_tensorrt_knows_every_operator(folder: Path, graph: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    # Earlier ones do not know TensorRT for RTX.
    pytest.importorskip("polygraphy", minversion="0.50")
    result = polygraphy(folder, "inspect", "capability", graph)
    assert result.returncode == 0
    assert "Graph is fully supported by TensorRT" in result.stdout


@pytest.fixture(scope="session")
def outputs(folder: Path) -> str:
    """Outputs of the exported graph in all cases, saved by Polygraphy."""
    result = polygraphy(
        folder, *("run", "engine.onnx", "--onnxrt", "--load-inputs", "inputs.json", "--save-outputs", "outputs.json")
    )
    assert result.returncode == 0, result.stdout
    return "outputs.json"


@pytest.mark.parametrize(("inputs", "different"), [("inputs.json", 0), ("altered.json", 1)])
def test_saved_outputs_are_those_of_the_marked_graph_and_of_no_other_inputs(
    folder: Path, feeds: dict[str, dict[str, np.ndarray]], outputs: str, inputs: str, different: int
) -> None:
    result = polygraphy(
        folder,
        *("run", "tensorrt.onnx", "--onnxrt", "--load-inputs", inputs),
        *("--load-outputs", outputs, "--atol", "0", "--rtol", "0"),
    )
    assert result.returncode == different, result.stdout
    assert f"Passed: {len(feeds) - different}/{len(feeds)} iterations" in result.stdout
