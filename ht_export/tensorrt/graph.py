"""The copy of the exported graph that TensorRT reads: the same file but for what its parser needs to be told."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser
from onnx import helper

from ht_export.graph.domains import DOMAIN, OPSET
from plugins.binaries import Form
from plugins.tensorrt_plugin import NAMES, NAMESPACE, VERSION, WINDOWED_NAME
from runtime.bindings import GraphDims


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
    found = {Form(node.op_type == WINDOWED_NAME, _is_capped(node)) for node in nodes}
    return sorted(found, key=lambda form: (form.windowed, form.capped))


def make_decomposable(model: onnx.ModelProto) -> None:
    """Let TensorRT write attention out where it has no fused kernel for it, as in float32.

    ONNX itself knows no such attribute, so that the result is for TensorRT's parser only.
    """
    for function in model.functions:
        for node in function.node:
            if node.op_type == "Attention":
                node.attribute.append(helper.make_attribute("TRT_decomposable", 1))


def write_caps_out(model: onnx.ModelProto, dims: GraphDims) -> None:
    """Write attention with a soft cap out as products and a softmax: TensorRT's own attention has no soft cap."""
    for node in _attention_nodes(model):
        if _is_capped(node):
            node.op_type = f"Capped{node.op_type}"
    for name in sorted({node.op_type for node in model.graph.node if node.op_type.startswith("Capped")}):
        windowed = name.removeprefix("Capped") == WINDOWED_NAME
        model.functions.append(onnx.parser.parse_function(_capped_function(name, dims, windowed)))
    used = {node.op_type for node in model.graph.node}
    kept = [function for function in model.functions if function.name in used]
    del model.functions[:]
    model.functions.extend(kept)


def _capped_function(name: str, dims: GraphDims, windowed: bool) -> str:
    """Return the function's text. Sizes that are known are constants, of which the parser does not lose track."""
    hidden = "And(valid, far)" if windowed else "Expand(valid, cache_shape)"
    group = dims.query_heads // dims.key_value_heads
    apart = f"0, {dims.key_value_heads}, {group}, -1, {dims.head_dim}"
    return f"""<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
    {name} <scale, softcap> (query, key_new, value_new, key_cache, value_cache, cache_length, tree_mask
        {", first_visible" if windowed else ""}) => (output) {{
      zero = Constant <value_int = 0> ()
      one = Constant <value_int = 1> ()
      axis_0 = Constant <value_ints = [0]> ()
      axis_1 = Constant <value_ints = [1]> ()
      axis_2 = Constant <value_ints = [2]> ()
      capacity = Shape <start = 2, end = 3> (key_cache)
      rows = Shape <start = 2, end = 3> (query)
      cache_shape = Concat <axis = 0> (axis_1, rows, capacity)
      capacity_number = Squeeze (capacity)
      slots = Range (zero, capacity_number, one)
      slots_row = Unsqueeze (slots, axis_0)
      lengths = Unsqueeze (cache_length, axis_1)
      within = Less (slots_row, lengths)
      valid = Unsqueeze (within, axis_1)
      {"first = Unsqueeze (first_visible, axis_2)" if windowed else ""}
      {"far = GreaterOrEqual (slots, first)" if windowed else ""}
      cached = {hidden}
      seen = Concat <axis = -1> (cached, tree_mask)
      heads = Constant <value_ints = [1, 2]> ()
      visible = Unsqueeze (seen, heads)
      keys = Concat <axis = 2> (key_cache, key_new)
      values = Concat <axis = 2> (value_cache, value_new)
      keys_by_group = Unsqueeze (keys, axis_2)
      values_by_group = Unsqueeze (values, axis_2)
      turned = Transpose <perm = [0, 1, 2, 4, 3]> (keys_by_group)
      apart = Constant <value_ints = [{apart}]> ()
      queries = Reshape (query, apart)
      products = MatMul (queries, turned)
      wide = Cast <to = 1> (products)
      factor = Constant <value_float: float = @scale> ()
      cap = Constant <value_float: float = @softcap> ()
      scores = Mul (wide, factor)
      of_cap = Div (scores, cap)
      bent = Tanh (of_cap)
      capped = Mul (bent, cap)
      nothing = Constant <value_float = -3.0e38> ()
      masked = Where (visible, capped, nothing)
      wide_weights = Softmax <axis = -1> (masked)
      weights = CastLike (wide_weights, query)
      attended = MatMul (weights, values_by_group)
      together = Constant <value_ints = [0, {dims.query_heads}, -1, {dims.head_dim}]> ()
      output = Reshape (attended, together)
    }}"""


def _is_capped(node: onnx.NodeProto) -> bool:
    return any(one.name == "softcap" and one.f != 0 for one in node.attribute)


def _attention_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in NAMES]


def write_for_tensorrt(graph: Path, out: Path, dims: GraphDims, *, plugin: bool, decomposable: bool) -> int:
    """Write the graph for TensorRT's parser beside `graph`, whose weights it shares; return its plugin nodes."""
    model = onnx.load(graph, load_external_data=False)
    count = mark_plugin(model) if plugin else 0
    if not plugin:
        write_caps_out(model, dims)
    if decomposable:
        make_decomposable(model)
    out.write_bytes(model.SerializeToString())
    return count
