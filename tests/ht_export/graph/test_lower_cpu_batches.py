"""The lowered graph with several requests in a pass: each is computed as the portable graph computes it alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.bundle.engine_file import read_engine_file
from runtime.engines.onnxruntime_cpu import GAPS
from runtime.rows import Rows, lay_out
from runtime.tree import Tree, chain
from tests.families import tiny_model
from tests.ht_export.graph.both_graphs import Graphs, assert_close, lower, passes, requests_of, trace

# Four layers, joined at 3, 1 and 3.
TINY = "tiny engine"
# Alternating, so that one layer sees all and one does not. Joined after the first, before it and after both.
WINDOWS = "qwen3, alternating windows"
MODELS = {WINDOWS: (1, 0, 2), "mistral, window": (0,)}


@pytest.fixture(scope="module", params=[TINY, *MODELS])
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    if request.param == TINY:
        path = request.getfixturevalue("tiny_engine")
        return Graphs.open(path, path.with_name("engine.cpu.onnx"), read_engine_file(path).dims)
    path, dims = trace(tiny_model(request.param), MODELS[request.param], tmp_path_factory.mktemp("graph"))
    return Graphs.open(path, lower(path, dims), dims)


def path_to(tree: Tree, node: int) -> list[int]:
    return [*path_to(tree, int(tree.parents[node])), node] if node else [0]


def assert_each_as_alone(
    graphs: Graphs,
    lengths: Sequence[int],
    chosen: Sequence[int],
    rows: Sequence[Rows],
    accepted: Sequence[Sequence[int]],
    spare: int,
    behind: float,
    seed: int = 0,
) -> None:
    """Run the requests `chosen` of all together; compare what each gets, and what is in all caches afterwards."""
    most = max(len(one.input_ids) for one in rows) + sum(map(max, zip(*(one.counts for one in rows), strict=True)))
    with requests_of(graphs, lengths, most + spare, behind, seed) as requests:
        alone = [requests.portable(index, one) for index, one in zip(chosen, rows, strict=True)]
        together = requests.lowered(chosen, rows)
        for place, (expected, one) in enumerate(zip(alone, rows, strict=True)):
            found = together.outputs(place)
            assert_close(np.array(found.logits), expected.logits[0], f"logits of request {place}")
            drafts = np.array([found.draft_logits[row] for row in range(sum(one.counts))], dtype=np.float32)
            assert_close(
                drafts.reshape(-1, graphs.dims.vocab_size), expected.draft_logits[0], f"draft_logits of request {place}"
            )
        if len(chosen) == len(lengths):
            # Otherwise those between have a row of no meaning, and slots may have moved.
            requests.assert_untouched(chosen, most)
        else:
            requests.assert_untouched([], 0)
        graphs.lowered.commit(together, accepted)
        for expected, kept in zip(alone, accepted, strict=True):
            graphs.portable.commit(expected, [kept])
        for slot, copied in zip(requests.slots, requests.caches, strict=True):
            assert slot.length == copied.length
            for ours, theirs in zip(requests.cache.of(slot), (copied.keys, copied.values), strict=True):
                assert_close(ours[..., : slot.length, :], theirs[:, 0, :, : slot.length], "the cache afterwards")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_trees_of_any_requests_are_computed_as_each_alone(graphs: Graphs, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(passes(graphs.dims.num_steps), min_size=1, max_size=7))
    chosen = data.draw(st.permutations(range(len(drawn))))[: data.draw(st.integers(1, 5))]
    lengths = [length for *_, length, _ in drawn]
    rows, accepted = [], []
    for index in chosen:
        tree, pseudo_parents, logit_rows, length, _ = drawn[index]
        rows.append(lay_out(tree, pseudo_parents, graphs.dims.join_order, length, logit_rows))
        # Some fail, and accept none.
        node = data.draw(st.integers(-1, len(tree) - 1))
        accepted.append(path_to(tree, node) if node >= 0 else [])
    # What lies behind the valid rows is never seen; passes left it there, and so it is numbers.
    behind = data.draw(st.sampled_from([0.0, 1e3, -1e9]))
    assert_each_as_alone(graphs, lengths, chosen, rows, accepted, drawn[0][-1], behind, data.draw(st.integers(0, 99)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_plain_steps_of_any_requests_are_computed_as_each_alone(graphs: Graphs, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=9))
    chosen = data.draw(st.permutations(range(len(lengths))))[: data.draw(st.integers(1, 6))]
    nothing = (np.empty(0, dtype=np.int64),) * graphs.dims.num_steps
    rows = [
        lay_out(chain([data.draw(st.integers(0, 263))]), nothing, graphs.dims.join_order, lengths[index])
        for index in chosen
    ]
    accepted = [data.draw(st.sampled_from([[0], [0], [0], []])) for _ in chosen]
    # Not even read.
    behind = data.draw(st.sampled_from([np.nan, 1e3]))
    assert_each_as_alone(
        graphs, lengths, chosen, rows, accepted, data.draw(st.integers(0, 9)), behind, data.draw(st.integers(0, 99))
    )


def test_plain_steps_run_over_a_few_others_rather_than_move_them(graphs: Graphs) -> None:
    nothing = (np.empty(0, dtype=np.int64),) * graphs.dims.num_steps
    with requests_of(graphs, [3] * (GAPS + 2), 2, 0.0) as requests:
        # All but the second.
        chosen = [index for index in range(GAPS + 2) if index != 1]
        for tokens, expected in (([1], list(range(GAPS + 2))), ([1, 2], [0, GAPS + 1, *range(2, GAPS + 1), 1])):
            rows = [lay_out(chain(tokens), nothing, graphs.dims.join_order, 3) for _ in chosen]
            requests.lowered(chosen, rows)
            assert [slot.place.index for slot in requests.slots] == expected


def test_a_long_request_beside_short_ones(graphs: Graphs) -> None:
    rng = np.random.default_rng(0)
    lengths = [3, 700, 0, 41]
    for count, pseudo in ((1, 0), (40, 1)):
        ends = (np.arange(count - pseudo, count),) * graphs.dims.num_steps
        rows = [
            lay_out(chain(rng.integers(0, 264, count).tolist()), ends, graphs.dims.join_order, length)
            for length in lengths
        ]
        assert_each_as_alone(graphs, lengths, range(4), rows, [range(count)] * 4, 3, 1e3)
