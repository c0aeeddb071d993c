"""The graph lowered for the CPU against the portable one that it is made of, in ONNX Runtime."""

import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxscript import BOOL, FLOAT, INT64, script
from onnxscript import opset23 as op

from ht_export.graph.lower_attention import FEW, LONG
from ht_export.graph.lower_cpu import can_be_lowered, lower_for_cpu
from ht_export.graph.trace import TreeAttention
from ht_export.verify.passes import LoweredEngine, difference, record
from runtime.bindings import Binding, GraphDims
from runtime.bundle.engine_file import read_engine_file
from runtime.engines.packing import stacked_rows
from runtime.rows import Rows, lay_out
from runtime.tree import chain
from tests.conftest import tiny_llama
from tests.ht_export.graph.both_graphs import Graphs, assert_close, lower, passes, requests_of, trace

NOTHING = np.empty(0, dtype=np.int64)
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
        model = tiny_llama(num_hidden_layers=1, **changes)
        path, dims = trace(model, layers, tmp_path_factory.mktemp("graph"))
        lowered = lower(path, dims)
    yield Graphs.open(path, lowered, dims)


def assert_same_pass(graphs: Graphs, rows: Rows, length: int, spare: int, seed: int = 0) -> None:
    """Run both graphs; compare the outputs and what is in the cache."""
    count = len(rows.position_ids)
    # Products read what is behind the valid rows, with a weight of zero.
    behind = 1e3 if length >= LONG and count <= FEW else np.nan
    with requests_of(graphs, [length], count + spare, behind, seed) as requests:
        expected, found = requests.portable(0, rows), requests.lowered([0], [rows])
        keys, values = found.new(graphs.dims)
        pairs = [
            ("logits", [found.logits], [expected.logits[0]]),
            ("draft_logits", [found.draft_logits], [expected.draft_logits[0]]),
            ("key_new", keys, expected.key_new),
            ("value_new", values, expected.value_new),
        ]
        for name, ours, theirs in pairs:
            for layer, (our, their) in enumerate(zip(ours, theirs, strict=True)):
                assert_close(our, their, f"{name} {layer}")
        requests.assert_untouched([0], count)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pass_computes_what_the_portable_graph_does_and_writes_new_rows_only(
    graphs: Graphs, data: st.DataObject
) -> None:
    tree, pseudo_parents, logit_rows, length, spare = data.draw(passes(graphs.dims.num_steps))
    rows = lay_out(tree, pseudo_parents, graphs.dims.join_order, length, logit_rows)
    assert_same_pass(graphs, rows, length, spare, seed=data.draw(st.integers(0, 1000)))


@pytest.mark.parametrize("drafting", [True, False])
@pytest.mark.parametrize(("count", "length"), [(1, 0), (256, 0), (256, 700), (1, 1500), (9, LONG), (40, 1001)])
def test_single_rows_and_chunks_after_long_contexts(graphs: Graphs, count: int, length: int, drafting: bool) -> None:
    tree = chain(np.random.default_rng(count).integers(0, 264, count).tolist())
    ends = tuple(np.arange(count - int(drafting), count) for _ in range(graphs.dims.num_steps))
    assert_same_pass(graphs, lay_out(tree, ends, graphs.dims.join_order, length), length, spare=3)


@pytest.mark.parametrize("lengths", [[LONG], [LONG + 300], [LONG, LONG + 7, 700], [LONG + 100, 100]])
@pytest.mark.parametrize("tokens", [1, 4])
def test_few_rows_after_long_contexts_are_those_of_the_portable_graph(
    graphs: Graphs, lengths: list[int], tokens: int
) -> None:
    dims = graphs.dims
    ends = tuple(np.arange(int(tokens > 1)) for _ in range(dims.num_steps))
    with requests_of(graphs, lengths, 20, 1e3) as requests:
        rows = [lay_out(chain([3] * tokens), ends, dims.join_order, length) for length in lengths]
        found = requests.lowered(range(len(lengths)), rows)
        for index, one in enumerate(rows):
            expected, ours = requests.portable(index, one), found.outputs(index)
            assert_close(ours.logits, expected.logits[0], f"logits {index}")
            for row, drafts in enumerate(expected.draft_logits[0]):
                assert_close(ours.draft_logits[row], drafts, f"draft logits {index} {row}")
        requests.assert_untouched(range(len(lengths)), max(len(one.position_ids) for one in rows))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is counted as Linux tells it")
@pytest.mark.parametrize(
    ("count", "tokens", "capacity"),
    [(1, 5, 1 << 21), (4, 1, 1 << 19), (2, 2, 1 << 16)],
    ids=["one request's tree", "a row of each of several", "trees of several"],
)
def test_the_cache_is_never_copied(graphs: Graphs, count: int, tokens: int, capacity: int) -> None:
    """Of a large cache a few pages are written: to copy it, of one layer even, would take memory for all."""
    dims = graphs.dims
    with requests_of(graphs, [0] * count, 8, 0.0) as requests:

        def run() -> None:
            rows = [
                lay_out(chain([3] * tokens), (NOTHING,) * dims.num_steps, dims.join_order, slot.length)
                for slot in requests.slots
            ]
            graphs.lowered.commit(requests.lowered(range(count), rows), [range(tokens)] * count)

        # What a session sets up in its first pass is not counted.
        run()
        requests.cache.reserve(0, capacity)
        before = resident_bytes()
        for _ in range(3):
            run()
        grown = resident_bytes() - before
        layer = requests.cache.arrays.nbytes // dims.num_layers
        # A layer's keys are half of its cache. Products have scores, weights and masks of all that there is room for.
        scores = 4 * count * tokens * dims.query_heads * capacity
        assert grown < layer * 0.33 + (4 * scores if count > 1 and tokens > 1 else 0)


def test_the_passes_of_the_parity_check(graphs: Graphs) -> None:
    expected = record(graphs.portable)
    assert difference(LoweredEngine(graphs.path, graphs.dims), expected) < 1e-5


def test_inputs_say_which_rows_are_whose_and_outputs_have_caches(graphs: Graphs) -> None:
    model = graphs.load()
    types = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.BOOL: "bool", onnx.TensorProto.FLOAT: "float32"}

    def read(values: list[onnx.ValueInfoProto]) -> list[Binding]:
        found = [(value.name, value.type.tensor_type) for value in values]
        return [
            Binding(name, types[tensor.elem_type], tuple(d.dim_param or d.dim_value for d in tensor.shape.dim))
            for name, tensor in found
        ]

    assert read(list(model.graph.input)) == graphs.dims.lowered_inputs()
    assert read(list(model.graph.output)) == graphs.dims.lowered_outputs()


def branches(node: onnx.NodeProto) -> dict[str, onnx.GraphProto]:
    return {attribute.name: attribute.g for attribute in node.attribute if attribute.HasField("g")}


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of all branches in it."""
    for node in graph.node:
        yield node
        for branch in branches(node).values():
            yield from all_nodes(branch)


def attention_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes that choose a layer's attention, in order."""
    return [node for node in graph.node if any("_cache_out_" in name for name in node.output)]


def test_one_operator_reads_and_writes_each_layers_cache_and_nothing_else_touches_it(graphs: Graphs) -> None:
    graph = graphs.load().graph
    chosen = attention_of(graph)
    layers = range(graphs.dims.num_layers)
    inputs = [[f"{kind}_cache_{layer}" for kind in ("key", "value")] for layer in layers]
    outputs = [[f"{kind}_cache_out_{layer}" for kind in ("key", "value")] for layer in layers]
    assert [node.op_type for node in chosen] == ["If" for _ in layers]
    assert [list(node.output[1:]) for node in chosen] == outputs
    for node, caches in zip(chosen, inputs, strict=True):
        several, one = branches(node)["then_branch"], branches(node)["else_branch"]
        # Short contexts and chunks of prompts.
        (grouped,) = one.node
        assert (grouped.op_type, list(grouped.input[3:5])) == ("GroupQueryAttention", caches)
        assert [value.name for value in one.output] == list(grouped.output)
        # Several rows of several requests, and few rows after long contexts.
        written = [node for node in several.node if node.op_type == "TensorScatter"]
        assert [node.input[0] for node in written] == caches
        assert all(node.input[2] == "cache_length" for node in written)
        products = [node for node in several.node if "MatMul" in node.op_type]
        assert [node.input[1] for node in products] == [node.output[0] for node in written]
        assert [value.name for value in several.output[1:]] == [node.output[0] for node in written]
    used = Counter(name for node in all_nodes(graph) for name in node.input if "_cache_" in name)
    measured = [node.input[0] for node in all_nodes(graph) if node.op_type == "Shape" and "_cache_" in node.input[0]]
    assert used == Counter([*(name for caches in inputs for name in caches * 2), *measured])
    assert measured == ["key_cache_0"] * 2
    assert not any(node.op_type == "TreeAttention" for node in all_nodes(graph))
    assert not graphs.load().functions


def test_a_lowered_graph_says_that_it_takes_any_number_of_requests(graphs: Graphs) -> None:
    assert {entry.key: entry.value for entry in graphs.load().metadata_props}["requests"] == "packed"
    assert graphs.lowered.max_batch > 1


def test_heads_are_taken_apart_for_products_alone(graphs: Graphs) -> None:
    graph = graphs.load().graph
    operators = Counter(node.op_type for node in graph.node)
    # The head's transpose, where it is the embedding.
    assert operators["Transpose"] <= 1
    assert operators["RotaryEmbedding"] == 2 * graphs.dims.num_layers
    for node in attention_of(graph):
        found = Counter(one.op_type for one in all_nodes(branches(node)["then_branch"]))
        assert found["Transpose"] == 4


def test_residual_sums_are_one_operator_with_the_normalisation_after_them(graphs: Graphs) -> None:
    operators = Counter(node.op_type for node in graphs.load().graph.node)
    dims = graphs.dims
    # The first one's rows are the embedding's, the last one's are gathered; others are joined by pseudo rows.
    plain = 2 + len({layer for layer in dims.transfer_layers if 0 < layer < dims.num_layers})
    assert operators["RMSNormalization"] == plain
    assert operators["SkipSimplifiedLayerNormalization"] == 2 * dims.num_layers + 1 - plain


def test_rows_see_later_ones_only_where_steps_join_out_of_order(graphs: Graphs) -> None:
    attention = [node for node in all_nodes(graphs.load().graph) if node.op_type == "GroupQueryAttention"]
    assert len(attention) == graphs.dims.num_layers
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
    expected = sessions[0].run(None, feed)
    found = sessions[1].run(None, feed | stacked_rows(1, count))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for cache, new, name in zip(found[2:], ("key", "value"), ("key_cache_0", "value_cache_0"), strict=True):
        np.testing.assert_array_equal(cache[:, :, :length], feed[name][:, :, :length])
        np.testing.assert_array_equal(cache[:, :, length : length + count], feed[new])


@pytest.mark.parametrize("length", [LONG, LONG + 126, LONG + 255])
def test_a_row_after_a_long_context_attends_as_it_does_alone_bit_by_bit(length: int) -> None:
    """Rows of a chain are in the places that they have in plain decoding, whatever room there is behind them."""
    model = ir.serde.deserialize_model(heads_apart.to_model_proto())
    lower_for_cpu(model, GraphDims(1, 4, 2, 8, 32, 8, (0,)))
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    rng = np.random.default_rng(0)
    count = 4
    new = {
        name: rng.standard_normal((1, heads, count, 8)).astype(np.float32)
        for name, heads in (("query", 4), ("key", 2), ("value", 2))
    }
    names = ("key_cache_0", "value_cache_0")
    caches = {name: rng.standard_normal((1, 2, length + 10, 8)).astype(np.float32) for name in names}

    def attended(first: int, rows: int, caches: dict[str, np.ndarray]) -> list[np.ndarray]:
        feed = {name: value[:, :, first : first + rows] for name, value in new.items()} | caches
        feed |= {"tree_mask": np.tri(rows, dtype=bool)[None], "cache_length": np.array([length + first])}
        return session.run(None, feed | stacked_rows(1, rows))

    together, _, *_ = attended(0, count, caches)
    for row in range(count):
        alone, _, *grown = attended(row, 1, caches)
        np.testing.assert_array_equal(alone[:, :, 0], together[:, :, row])
        caches = {
            name: np.pad(cache, ((0, 0), (0, 0), (0, 64), (0, 0))) for name, cache in zip(names, grown, strict=True)
        }
