"""The copy of the exported graph that TensorRT reads: the same file but for what its parser needs to be told."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from ht_export.graph import DOMAIN
from plugins.binaries import Form
from plugins.tensorrt_plugin import NAMES, NAMESPACE, VERSION, WINDOWED_NAME


def mark_plugin(model: onnx.ModelProto) -> int:
    """Let the nodes of tree attention name the plugin; return how many there are.

    Where that is not registered, and in other runtimes, the node stays a call of the graph's local function.
    """
    nodes = _attention_nodes(model)
    for node in nodes:
        node.attribute.append(helper.make_attribute("plugin_namespace", NAMESPACE))
        node.attribute.append(helper.make_attribute("plugin_version", VERSION))
    return len(nodes)


def attention_forms(graph: Path) -> list[Form]:
    """Return the forms of tree attention that there are in the graph at `graph`."""
    nodes = _attention_nodes(onnx.load(graph, load_external_data=False))
    found = {
        Form(node.op_type == WINDOWED_NAME, any(one.name == "softcap" and one.f != 0 for one in node.attribute))
        for node in nodes
    }
    return sorted(found, key=lambda form: (form.windowed, form.capped))


def make_decomposable(model: onnx.ModelProto) -> None:
    """Let TensorRT write attention out where it has no fused kernel for it, as in float32.

    ONNX itself knows no such attribute, so that the result is for TensorRT's parser only.
    """
    for function in model.functions:
        for node in function.node:
            if node.op_type == "Attention":
                node.attribute.append(helper.make_attribute("TRT_decomposable", 1))


def _attention_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in NAMES]


def write_for_tensorrt(graph: Path, out: Path, *, plugin: bool, decomposable: bool) -> int:
    """Write the graph for TensorRT's parser beside `graph`, whose weights it shares; return its plugin nodes."""
    model = onnx.load(graph, load_external_data=False)
    count = mark_plugin(model) if plugin else 0
    if decomposable:
        make_decomposable(model)
    out.write_bytes(model.SerializeToString())
    return count
