"""The trace of passes says what was verified, what was accepted, and who had proposed it; and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import Generator, Pass, Sampling
from runtime.decode import DecodingState
from runtime.drafting.drafter import Drafter
from runtime.drafting.sizing import FixedSizes
from runtime.drafting.source import DraftSource
from runtime.drafting.text_drafts import TextDrafts
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.scheduling.scheduler import Limits, run
from runtime.trace import Trace, sources_of
from runtime.tree import Tree, TreeSizes, candidate_path, root_alone
from tests.five_nodes import EXAMPLE
from tests.runtime.known_engine import jobs_of
from tests.runtime.test_decode import DIMS, VOCAB, known_engine, plain


@pytest.fixture(scope="module")
def generator(tiny_engine: Path) -> Iterator[Generator]:
    with Generator(tiny_engine, threads=1, adapt=False) as generator:
        yield generator


def fits(one: Pass) -> None:
    """A pass agrees with itself: accepted nodes are a path from the root, and its tokens are theirs and one more."""
    if one.prompt:
        assert (one.nodes, one.accepted) == ((), ())
        assert len(one.tokens) <= 1
        return
    assert one.rows == len(one.nodes)
    assert [node.parent < place for place, node in enumerate(one.nodes)] == [True] * len(one.nodes)
    assert (one.nodes[0].parent, one.nodes[0].probability, one.nodes[0].sources) == (-1, 1.0, ())
    assert one.accepted[0] == 0
    for parent, child in pairwise(one.accepted):
        assert one.nodes[child].parent == parent
        assert one.nodes[child].probability <= one.nodes[parent].probability
    assert [one.nodes[node].token for node in one.accepted[1:]] == list(one.tokens[:-1])
    assert one.seconds >= 0.0


def test_each_node_of_the_drawn_tree_names_those_that_proposed_it() -> None:
    tree = EXAMPLE.TREE
    the, cat, dog, sat, is_ = tree.tokens.tolist()
    ngrams = candidate_path(the, [cat, is_, dog], [0.9, 0.9, 0.9])
    others = candidate_path(the, [sat], [0.1])
    found = sources_of(tree, [("layers", tree), ("text", ngrams), ("others", others), ("nothing", root_alone(the))])
    assert found == [(), ("layers", "text"), ("layers",), ("layers",), ("layers", "text")]


def test_what_a_grammar_forces_names_it_whoever_else_proposed_it() -> None:
    tree = candidate_path(1, [2, 3], [0.5, 0.5])
    # The last node was cut off.
    assert sources_of(tree, [("layers", tree)], {2, 3}) == [(), ("layers",), ("layers", "grammar")]


def test_the_same_token_elsewhere_in_a_tree_is_another_candidate() -> None:
    tree = Tree(np.array([1, 2, 3, 2]), np.array([-1, 0, 0, 2]), np.array([0, 1, 1, 2]), np.array([1.0, 0.5, 0.4, 0.2]))
    assert sources_of(tree, [("a", candidate_path(1, [2], [0.5])), ("b", candidate_path(1, [3, 2], [0.5, 0.5]))]) == [
        (),
        ("a",),
        ("b",),
        ("b",),
    ]


@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    st.lists(st.booleans(), min_size=1, max_size=7),
    st.integers(1, 9),
    st.tuples(*[st.integers(0, 9)] * 3),
    st.integers(1, 8),
    st.integers(1, 20),
    st.booleans(),
)
def test_the_tokens_of_all_passes_are_those_of_the_answer(
    prompt: list[int],
    right: list[bool],
    tree_rows: int,
    pseudo_rows: tuple[int, ...],
    chunk: int,
    count: int,
    ngrams: bool,
) -> None:
    sources: list[DraftSource] = [TransferDrafts(), *([TextDrafts()] if ngrams else [])]
    drafter = Drafter(FixedSizes(TreeSizes(tree_rows, pseudo_rows)), sources)
    trace = Trace()
    state = DecodingState(prompt, drafter, chunk, DIMS.join_order, max_new_tokens=count, trace=trace)
    engine = known_engine(right)
    list(run(engine, jobs_of([state]), Limits(prompt_chunk=chunk)))
    passes = trace.take()
    assert [token for one in passes for token in one.tokens] == state.tokens == plain(prompt, count)
    assert len(passes) == len(engine.batches)
    assert sum(one.rows for one in passes if one.prompt) == len(prompt)
    # The root of each tree is the last token before it.
    assert [one.nodes[0].token for one in passes if not one.prompt] == [
        one.tokens[-1] for one in passes[:-1] if one.tokens
    ]
    assert sum(len(one.nodes) - 1 for one in passes if not one.prompt) == state.candidates
    assert sum(len(one.accepted) - 1 for one in passes if not one.prompt) == state.accepted
    for one in passes:
        fits(one)
        for node in one.nodes[1:]:
            assert node.sources
            assert set(node.sources) <= {source.name for source in sources}
    assert trace.take() == []


@pytest.mark.parametrize(
    ("sampling", "stop"),
    [(None, []), (Sampling(temperature=1.0, seed=3), []), (Sampling(temperature=1.0, seed=5), ["e", "aa"])],
)
@pytest.mark.parametrize("speculate", [True, False])
def test_a_trace_changes_no_text_and_its_texts_are_the_answers(
    generator: Generator, sampling: Sampling | None, stop: Sequence[str], speculate: bool
) -> None:
    # Tokens of the tiny model are bytes: characters span them.
    asked: Any = {"max_new_tokens": 60, "sampling": sampling, "stop": stop, "speculate": speculate}
    untraced = generator.generate("Hello, äöü", **asked)
    chunks = list(generator.stream("Hello, äöü", trace=True, **asked))
    result = chunks[-1].result
    assert result is not None and result.passes is not None
    assert (result.text, result.tokens) == (untraced.text, untraced.tokens)
    assert untraced.passes is None
    assert [one for chunk in chunks for one in chunk.passes or ()] == result.passes
    for chunk in chunks:
        assert chunk.passes is not None
        assert [token for one in chunk.passes for token in one.tokens] == chunk.tokens
        assert "".join(text for one in chunk.passes for text in one.texts) == chunk.text
        for one in chunk.passes:
            fits(one)
            assert len(one.texts) == len(one.tokens)
    assert len([one for one in result.passes if one.tokens]) == result.steps
    if not speculate:
        assert {len(one.nodes) for one in result.passes if not one.prompt} <= {1}


def test_without_a_trace_chunks_have_none(generator: Generator) -> None:
    assert {chunk.passes for chunk in generator.stream("Hello", max_new_tokens=5)} == {None}


def test_a_text_that_a_deadline_ends_is_that_of_its_passes(generator: Generator) -> None:
    result = generator.generate("Hello", max_new_tokens=None, ignore_stop_tokens=True, deadline_s=0.05, trace=True)
    assert result.passes is not None
    assert "".join(text for one in result.passes for text in one.texts) == result.text
    assert [token for one in result.passes for token in one.tokens] == result.tokens
