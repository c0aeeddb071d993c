"""The graph lowered for the CPU against the portable one that it is made of, in ONNX Runtime."""

import ctypes
import gc
import mmap
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ht_export.graph.lower_cpu import can_be_lowered
from ht_export.graph.lower_visible import FEW, LONG
from ht_export.verify.passes import LoweredEngine, difference, record
from runtime.bindings import Binding, GraphDims
from runtime.bundle.engine_file import read_engine_file
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
@pytest.mark.parametrize(("count", "length"), [(1, 0), (256, 0), (256, 700), (1, 1500), (9, LONG), (FEW + 1, 1001)])
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
    """Return what this process holds, without what earlier tests left: freed midway, or used anew, it would count."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


counted = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is counted as Linux and glibc tell it")
# How many requests, tokens and room of each, how full that is, and the memory, in terms of a layer's cache, that
# passes may take. A copy of a layer's keys, and what follows of it, was seen to take 1.5 at least (trees: 2.8),
# where masks and scores alone take 0.2 to 0.8, as the allocator has it.
PASSES_OF_LARGE_CACHES = pytest.mark.parametrize(
    ("count", "tokens", "capacity", "full", "bound"),
    [
        (1, 5, 1 << 21, 0.0, 0.33),
        (4, 1, 1 << 19, 0.0, 0.33),
        (2, 2, 1 << 18, 0.0, 1.5),
        (1, 2, 1 << 19, 0.9, 0.33),
        (4, 1, 1 << 17, 0.9, 0.33),
    ],
    ids=[
        "one request's tree",
        "a row of each of several",
        "trees of several",
        "one request's tree after a long context",
        "a row of each of several after long contexts",
    ],
)


def memory_taken(graphs: Graphs, count: int, tokens: int, capacity: int, full: float) -> float:
    """Return what passes of requests with `full` slots take, in terms of a layer's cache, of which they write a few
    pages.
    """
    dims = graphs.dims
    with requests_of(graphs, [0] * count, 8, 0.0) as requests:
        # The places of rows tell nothing of memory: what is cached was never written.
        rows = [lay_out(chain([3] * tokens), (NOTHING,) * dims.num_steps, dims.join_order, 0)] * count

        def run() -> None:
            graphs.lowered.commit(requests.lowered(range(count), rows), [range(tokens)] * count)

        # What a session sets up in its first pass is not counted.
        run()
        requests.cache.reserve(0, capacity)
        for slot in requests.slots:
            slot.place.length = int(capacity * full)
        before = resident_bytes()
        for _ in range(3):
            run()
        return (resident_bytes() - before) * dims.num_layers / requests.cache.arrays.nbytes


@counted
@PASSES_OF_LARGE_CACHES
def test_the_cache_is_never_copied(
    graphs: Graphs, count: int, tokens: int, capacity: int, full: float, bound: float
) -> None:
    """To copy it, of one layer even, would take memory for all."""
    assert memory_taken(graphs, count, tokens, capacity, full) < bound


def copies_one_layer(graphs: Graphs) -> Graphs:
    """Return graphs of which the lowered one copies the keys of its first layer before they are read and written."""
    model = graphs.load()
    constants = {"copy_zero": [0], "copy_one": [1], "copy_end": [1 << 40], "copy_axis": [2]}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(v), name) for name, v in constants.items())
    for graph in all_graphs(model.graph):
        for index, node in reversed(list(enumerate(graph.node))):
            if node.op_type in ("GroupQueryAttention", "TensorScatter") and "key_cache_0" in node.input:
                parts = [f"{node.name or node.output[0]}_part_{part}" for part in range(3)]
                make = onnx.helper.make_node
                node.input[list(node.input).index("key_cache_0")] = parts[2]
                for made in (
                    make("Concat", parts[:2], parts[2:], axis=2),
                    make("Slice", ["key_cache_0", "copy_one", "copy_end", "copy_axis"], parts[1:2]),
                    make("Slice", ["key_cache_0", "copy_zero", "copy_one", "copy_axis"], parts[:1]),
                ):
                    graph.node.insert(index, made)
    path = graphs.path.with_name("copying.cpu.onnx")
    onnx.save(model, path)
    try:
        return Graphs.open(graphs.path.with_name("engine.onnx"), path, graphs.dims)
    finally:
        # It lay beside the weights, in a folder that other tests look into.
        path.unlink()


@counted
@PASSES_OF_LARGE_CACHES
def test_a_copy_of_one_layers_keys_would_be_noticed(
    graphs: Graphs, count: int, tokens: int, capacity: int, full: float, bound: float
) -> None:
    assert memory_taken(copies_one_layer(graphs), count, tokens, capacity, full) > bound


@pytest.mark.parametrize(
    ("lengths", "tokens", "spare", "products"),
    [
        ([LONG], 1, 0, True),
        ([LONG], FEW, 0, True),
        ([LONG - 1], 1, 0, False),
        ([LONG], FEW + 1, 0, False),
        ([LONG], 1, LONG // 2 - 1, True),
        ([LONG], 1, LONG // 2, False),
        ([LONG, LONG], 1, 0, True),
        ([LONG, LONG // 4], 1, 0, False),
    ],
)
def test_products_are_taken_for_few_rows_after_long_contexts_with_little_room_to_spare(
    graphs: Graphs, lengths: list[int], tokens: int, spare: int, products: bool
) -> None:
    """Products alone read what is behind the rows."""
    with requests_of(graphs, lengths, tokens + spare, np.nan) as requests:
        rows = [
            lay_out(chain([3] * tokens), (NOTHING,) * graphs.dims.num_steps, graphs.dims.join_order, length)
            for length in lengths
        ]
        found = requests.lowered(range(len(lengths)), rows)
        shared = graphs.dims.query_heads > graphs.dims.key_value_heads
        assert np.isnan(found.logits).any() == (products and shared)


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


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and all branches in it."""
    yield graph
    for node in graph.node:
        for branch in branches(node).values():
            yield from all_graphs(branch)


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of all branches in it."""
    for one in all_graphs(graph):
        yield from one.node


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
        # Short contexts and chunks of prompts.
        (grouped,) = branches(node)["then_branch"].node
        assert (grouped.op_type, list(grouped.input[3:5])) == ("GroupQueryAttention", caches)
        assert [value.name for value in branches(node)["then_branch"].output] == list(grouped.output)
        (other,) = branches(node)["else_branch"].node
        # Several rows of several requests, and few rows after long contexts.
        for branch, readers in (("then_branch", ["Attention"]), ("else_branch", ["FusedMatMul", "MatMul"])):
            form = branches(other)[branch]
            written = [one for one in form.node if one.op_type == "TensorScatter" and one.input[0] in caches]
            assert [one.input[0] for one in written] == caches
            assert all(one.input[2] == "cache_length" for one in written)
            cached = [one.output[0] for one in written]
            reading = [one for one in form.node if set(one.input) & set(cached)]
            assert [one.op_type for one in reading] == readers
            assert [name for one in reading for name in one.input if name in cached] == cached
            assert [value.name for value in form.output[1:]] == cached
    used = Counter(name for node in all_nodes(graph) for name in node.input if "_cache_" in name)
    measured = [node.input[0] for node in all_nodes(graph) if node.op_type == "Shape" and "_cache_" in node.input[0]]
    assert used == Counter([*(name for caches in inputs for name in caches * 3), *measured])
    assert measured == ["key_cache_0"] * 2
    assert not any(node.op_type == "TreeAttention" for node in all_nodes(graph))
    assert not graphs.load().functions


def test_a_lowered_graph_says_that_it_takes_any_number_of_requests(graphs: Graphs) -> None:
    assert {entry.key: entry.value for entry in graphs.load().metadata_props}["requests"] == "packed"
    assert graphs.lowered.max_batch > 1


def test_heads_are_never_taken_apart_by_the_operator_that_short_contexts_take(graphs: Graphs) -> None:
    graph = graphs.load().graph
    operators = Counter(node.op_type for node in graph.node)
    # The head's transpose, where it is the embedding.
    assert operators["Transpose"] <= 1
    assert operators["RotaryEmbedding"] == 2 * graphs.dims.num_layers
    for node in attention_of(graph):
        (grouped,) = branches(node)["then_branch"].node
        assert grouped.op_type == "GroupQueryAttention"
        (other,) = branches(node)["else_branch"].node
        for form in branches(other).values():
            assert Counter(one.op_type for one in form.node)["Transpose"] == 4


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
