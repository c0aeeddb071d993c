"""The graph lowered for the CPU against the portable one that it is made of, in ONNX Runtime."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxscript import BOOL, FLOAT, INT64, script
from onnxscript import opset23 as op

from ht_export.graph.lower_cpu import can_be_lowered, lower_for_cpu
from ht_export.graph.trace import TreeAttention, build_graph, graph_dims
from ht_export.model.reference import HiddenTransferModel
from ht_export.verify.passes import LoweredEngine, difference, record
from runtime.bindings import Binding, GraphDims
from runtime.bundle.engine_file import read_engine_file
from runtime.engines.host_cache import KeyValueCache
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.engines.onnxruntime_cpu import InPlaceCache, OnnxRuntimeCpuEngine
from runtime.rows import Rows, lay_out
from runtime.tree import Tree, chain
from tests.conftest import random_transfer, tiny_llama
from tests.passes import run_one
from tests.strategies import trees


@dataclass(frozen=True)
class Graphs:
    """A portable graph and the lowered one beside it, each with an engine."""

    portable: OnnxRuntimeEngine
    lowered: OnnxRuntimeCpuEngine
    path: Path

    @property
    def dims(self) -> GraphDims:
        return self.portable.dims

    def load(self) -> onnx.ModelProto:
        """Return the lowered graph without its weights."""
        return onnx.load(self.path, load_external_data=False)


# Each of one layer, joined before and after it.
MODELS = {
    "in order, head of its own, as many heads for keys": (
        (0, 1),
        {"tie_word_embeddings": False, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    ),
    "out of order, tied head, one head for keys": (
        (1, 0),
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64},
    ),
}
# Four layers, joined at 3, 1 and 3, with heads of 8.
TINY = "tiny engine"


@pytest.fixture(scope="module", params=[TINY, *MODELS])
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graphs]:
    if request.param == TINY:
        path = request.getfixturevalue("tiny_engine")
        dims, lowered = read_engine_file(path).dims, path.with_name("engine.cpu.onnx")
    else:
        layers, changes = MODELS[request.param]
        path, dims = trace(layers, changes, tmp_path_factory.mktemp("graph"))
        lowered = lower(path, dims)
    yield Graphs(OnnxRuntimeEngine(path, dims, threads=1), OnnxRuntimeCpuEngine(lowered, dims, threads=1), lowered)


def trace(layers: tuple[int, ...], changes: dict[str, Any], folder: Path) -> tuple[Path, GraphDims]:
    """Write the portable graph of a model of one layer; return its path and dimensions."""
    model = HiddenTransferModel(tiny_llama(num_hidden_layers=1, **changes), random_transfer(layers)).eval()
    path = folder / "engine.onnx"
    ir.save(build_graph(model), path, external_data="engine.onnx.data")
    return path, graph_dims(model.base.config, model.transfer)


def lower(path: Path, dims: GraphDims) -> Path:
    model = ir.load(path)
    lower_for_cpu(model, dims)
    lowered = path.with_name("engine.cpu.onnx")
    ir.save(model, lowered)
    return lowered


@st.composite
def passes(draw: st.DrawFn, steps: int) -> tuple[Tree, tuple[np.ndarray, ...], np.ndarray, int, int]:
    """Any tree, its pseudo rows' parents by step, the rows whose logits are wanted, cached rows and room to spare."""
    tree = draw(trees(max_rows=9))
    some = st.lists(st.integers(0, len(tree) - 1), unique=True).map(lambda rows: np.array(sorted(rows), dtype=np.int64))
    pseudo_parents = tuple(draw(some) for _ in range(steps))
    return tree, pseudo_parents, draw(some), draw(st.integers(0, 20)), draw(st.integers(0, 20))


def caches(dims: GraphDims, length: int, room: int, seed: int) -> tuple[KeyValueCache, InPlaceCache]:
    """Return caches with the same `length` rows; the one that is written in place has `room` more, of no numbers."""
    rng = np.random.default_rng(seed)
    cache, in_place = KeyValueCache(dims), InPlaceCache(dims)
    rows = rng.standard_normal((2, dims.num_layers, 1, dims.key_value_heads, length, dims.head_dim))
    cache.keys, cache.values = rows.astype(np.float32)
    in_place.arrays = np.full((*rows.shape[:4], length + room, dims.head_dim), np.nan, dtype=np.float32)
    in_place.arrays[..., :length, :] = rows
    cache.length = in_place.length = length
    return cache, in_place


def assert_same_pass(graphs: Graphs, rows: Rows, length: int, spare: int, seed: int = 0) -> None:
    """Run both graphs; compare the outputs and what is in the cache."""
    count = len(rows.position_ids)
    cache, in_place = caches(graphs.dims, length, count + spare, seed)
    before = in_place.arrays.copy()
    expected, found = run_one(graphs.portable, rows, cache), run_one(graphs.lowered, rows, in_place)
    keys, values = found.new(graphs.dims)
    pairs = [
        ("logits", [found.logits], [expected.logits[0]]),
        ("draft_logits", [found.draft_logits], [expected.draft_logits[0]]),
        ("key_new", keys, expected.key_new),
        ("value_new", values, expected.value_new),
    ]
    for name, ours, theirs in pairs:
        for layer, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            np.testing.assert_allclose(our, their, atol=2e-4, rtol=1e-4, err_msg=f"{name} {layer}", strict=True)
    np.testing.assert_array_equal(in_place.arrays[..., :length, :], before[..., :length, :])
    assert np.isnan(in_place.arrays[..., length + count :, :]).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pass_computes_what_the_portable_graph_does_and_writes_new_rows_only(
    graphs: Graphs, data: st.DataObject
) -> None:
    tree, pseudo_parents, logit_rows, length, spare = data.draw(passes(graphs.dims.num_steps))
    rows = lay_out(tree, pseudo_parents, graphs.dims.join_order, length, logit_rows)
    assert_same_pass(graphs, rows, length, spare, seed=data.draw(st.integers(0, 1000)))


@pytest.mark.parametrize("drafting", [True, False])
@pytest.mark.parametrize(("count", "length"), [(1, 0), (256, 0), (256, 700), (1, 1500), (40, 1001)])
def test_single_rows_and_chunks_after_long_contexts(graphs: Graphs, count: int, length: int, drafting: bool) -> None:
    tree = chain(np.random.default_rng(count).integers(0, 264, count).tolist())
    ends = tuple(np.arange(count - int(drafting), count) for _ in range(graphs.dims.num_steps))
    assert_same_pass(graphs, lay_out(tree, ends, graphs.dims.join_order, length), length, spare=3)


def test_the_passes_of_the_parity_check(graphs: Graphs) -> None:
    expected = record(graphs.portable)
    assert difference(LoweredEngine(graphs.path, graphs.dims), expected) < 1e-5


def test_inputs_are_those_of_the_portable_graph_and_outputs_have_caches(graphs: Graphs) -> None:
    model = graphs.load()
    types = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.BOOL: "bool", onnx.TensorProto.FLOAT: "float32"}

    def read(values: list[onnx.ValueInfoProto]) -> list[Binding]:
        found = [(value.name, value.type.tensor_type) for value in values]
        return [
            Binding(name, types[tensor.elem_type], tuple(d.dim_param or d.dim_value for d in tensor.shape.dim))
            for name, tensor in found
        ]

    assert read(list(model.graph.input)) == graphs.dims.inputs()
    assert read(list(model.graph.output)) == graphs.dims.lowered_outputs()


def test_one_operator_reads_and_writes_each_layers_cache_and_nothing_else_touches_it(graphs: Graphs) -> None:
    model = graphs.load()
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    layers = range(graphs.dims.num_layers)
    expected = [[f"{kind}_cache_{layer}" for kind in ("key", "value")] for layer in layers]
    assert [list(node.input[3:5]) for node in attention] == expected
    expected = [[f"{kind}_cache_out_{layer}" for kind in ("key", "value")] for layer in layers]
    assert [list(node.output[1:]) for node in attention] == expected
    used = Counter(name for node in model.graph.node for name in node.input if "_cache_" in name)
    assert used == Counter(name for node in attention for name in node.input[3:5])
    assert not any(node.op_type == "TreeAttention" for node in model.graph.node)
    assert not model.functions


def test_heads_are_never_taken_apart(graphs: Graphs) -> None:
    operators = Counter(node.op_type for node in graphs.load().graph.node)
    # The head's transpose, where it is the embedding.
    assert operators["Transpose"] <= 1
    assert operators["RotaryEmbedding"] == 2 * graphs.dims.num_layers


def test_residual_sums_are_one_operator_with_the_normalisation_after_them(graphs: Graphs) -> None:
    operators = Counter(node.op_type for node in graphs.load().graph.node)
    dims = graphs.dims
    # The first one's rows are the embedding's, the last one's are gathered; others are joined by pseudo rows.
    plain = 2 + len({layer for layer in dims.transfer_layers if 0 < layer < dims.num_layers})
    assert operators["RMSNormalization"] == plain
    assert operators["SkipSimplifiedLayerNormalization"] == 2 * dims.num_layers + 1 - plain


def test_rows_see_later_ones_only_where_steps_join_out_of_order(graphs: Graphs) -> None:
    attention = [node for node in graphs.load().graph.node if node.op_type == "GroupQueryAttention"]
    attributes = [{attribute.name: attribute.i for attribute in node.attribute} for node in attention]
    in_order = list(graphs.dims.join_order) == sorted(graphs.dims.join_order)
    # ONNX Runtime has it from version 1.30 on.
    assert all(found.get("causal", 1) == int(in_order) and ("causal" in found) != in_order for found in attributes)


def test_a_lowered_graph_has_the_weights_of_the_portable_one(graphs: Graphs) -> None:
    places = [
        {(e.value, i.name) for i in model.graph.initializer for e in i.external_data if e.key == "location"}
        for model in (graphs.load(), onnx.load(graphs.path.with_name("engine.onnx"), load_external_data=False))
    ]
    assert places[0] == places[1]
    assert {location for location, _ in places[0]} == {"engine.onnx.data"}


def test_what_there_is_no_lowered_graph_for() -> None:
    dims = GraphDims(2, 4, 2, 64, 256, 100, (1,))
    assert can_be_lowered(dims)
    assert can_be_lowered(replace(dims, head_dim=8))
    assert not can_be_lowered(replace(dims, head_dim=20))
    assert not can_be_lowered(replace(dims, dtype="float16"))


@script(default_opset=op)
def heads_apart(
    query: FLOAT[1, 4, "R", 8],  # noqa: F821
    key: FLOAT[1, 2, "R", 8],  # noqa: F821
    value: FLOAT[1, 2, "R", 8],  # noqa: F821
    tree_mask: BOOL[1, "R", "R"],  # noqa: F821
    cache_length: INT64[1],
    key_cache_0: FLOAT[1, 2, "S", 8],  # noqa: F821
    value_cache_0: FLOAT[1, 2, "S", 8],  # noqa: F821
):
    attended = TreeAttention(
        query, key, value, key_cache_0, value_cache_0, cache_length, tree_mask, scale=0.3, softcap=0.0
    )
    logits = op.Mul(attended, attended)
    draft_logits = op.Neg(attended)
    return logits, draft_logits, op.Identity(key), op.Identity(value)


def test_attention_that_nothing_prepares_by_row_is_lowered_too() -> None:
    before = heads_apart.to_model_proto()
    model = ir.serde.deserialize_model(before)
    lower_for_cpu(model, GraphDims(1, 4, 2, 8, 32, 8, (0,)))
    after = ir.serde.serialize_model(model)
    sessions = [onnxruntime.InferenceSession(graph.SerializeToString()) for graph in (before, after)]
    rng = np.random.default_rng(0)
    count, length, capacity = 3, 5, 11
    feed = {
        name: rng.standard_normal((1, heads, rows, 8)).astype(np.float32)
        for name, heads, rows in (
            ("query", 4, count),
            ("key", 2, count),
            ("value", 2, count),
            ("key_cache_0", 2, capacity),
            ("value_cache_0", 2, capacity),
        )
    }
    feed |= {"tree_mask": np.array([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=bool), "cache_length": np.array([length])}
    expected, found = (session.run(None, feed) for session in sessions)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for cache, new, name in zip(found[2:], ("key", "value"), ("key_cache_0", "value_cache_0"), strict=True):
        np.testing.assert_array_equal(cache[:, :, :length], feed[name][:, :, :length])
        np.testing.assert_array_equal(cache[:, :, length : length + count], feed[new])
