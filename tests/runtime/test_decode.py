"""The loop against an engine whose base model and drafts are known functions of the text."""

from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.bindings import GraphDims
from runtime.decode import Accepted, DecodingState, decode, verify
from runtime.drafting.correction import TokenCorrection
from runtime.drafting.drafter import Drafter, Offer
from runtime.drafting.sizing import FixedSizes
from runtime.drafting.source import DraftSource
from runtime.drafting.text_drafts import TextDrafts
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.rows import HostOutputs, Phase, Rows, lay_out
from runtime.tree import Tree, TreeSizes
from tests.five_nodes import EXAMPLE
from tests.passes import run_one
from tests.runtime.known_engine import KnownEngine, Text, steps
from tests.strategies import trees

VOCAB = 11
DIMS = GraphDims(1, 1, 1, 1, 1, VOCAB, (0, 0, 0))


def next_token(text: Text) -> int:
    return (sum(text[-3:]) * 7 + len(text)) % VOCAB


def known_engine(right: list[bool], max_batch: int = 1, dims: GraphDims = DIMS) -> KnownEngine:
    """Return an engine that continues every text by `next_token`. A draft is right when `right[position]` says so, and
    otherwise puts the right token second.
    """

    def logits(text: Text) -> np.ndarray:
        return np.eye(VOCAB, dtype=np.float32)[next_token(text)]

    def draft_logits(text: Text, step: int) -> np.ndarray:
        for _ in range(step):
            text = (*text, next_token(text))
        draft = 5 * logits(text)
        if not right[len(text) % len(right)]:
            draft[(next_token(text) + 1) % VOCAB] = 6
        return draft

    return KnownEngine(dims, logits, draft_logits, max_batch)


def random_correction(seed: int) -> TokenCorrection:
    rng = np.random.default_rng(seed)
    candidates, contexts = rng.standard_normal((2, VOCAB, 2))
    return TokenCorrection(candidates, contexts, rng.standard_normal((3, 2)))


def fixed(tree_rows: int, *pseudo_rows: int) -> Drafter:
    return Drafter(FixedSizes(TreeSizes(tree_rows, pseudo_rows)), [TransferDrafts()])


def plain(prompt: list[int], count: int) -> list[int]:
    text = tuple(prompt)
    for _ in range(count):
        text = (*text, next_token(text))
    return list(text[len(prompt) :])


@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    st.lists(st.booleans(), min_size=1, max_size=7),
    st.integers(1, 9),
    st.tuples(*[st.integers(0, 9)] * 3),
    st.integers(1, 8),
    st.none() | st.integers(0, 99).map(random_correction),
    st.booleans(),
)
def test_any_tree_and_any_drafts_give_the_tokens_of_plain_decoding(
    prompt: list[int],
    right: list[bool],
    tree_rows: int,
    pseudo_rows: tuple[int, ...],
    chunk: int,
    correction: TokenCorrection | None,
    ngrams: bool,
) -> None:
    sources: list[DraftSource] = [TransferDrafts(correction), *([TextDrafts()] if ngrams else [])]
    drafter = Drafter(FixedSizes(TreeSizes(tree_rows, pseudo_rows)), sources)
    found = islice(steps(known_engine(right), prompt, drafter, chunk), 15)
    tokens = [token for certain in found for token in certain]
    assert tokens == plain(prompt, len(tokens))


def test_right_drafts_give_one_more_token_than_there_are_draft_steps() -> None:
    engine = known_engine([True])
    found = list(islice(steps(engine, [1, 2, 3], fixed(4, 4, 4, 4)), 6))
    assert [len(certain) for certain in found] == [1, 4, 4, 4, 4, 4]
    assert len(engine.batches) == 6


def test_plain_decoding_makes_one_token_certain_in_each_pass() -> None:
    found = list(islice(steps(known_engine([True]), [1, 2, 3], fixed(1, 0, 0, 0)), 6))
    assert [len(certain) for certain in found] == [1] * 6


def test_a_prompt_is_run_in_chunks_and_only_its_end_drafts() -> None:
    engine = known_engine([True])
    next(steps(engine, list(range(10)), fixed(4, 4, 4, 4), 4))
    (prompt,) = zip(*(batch.rows for batch in engine.batches), strict=True)
    assert [len(rows.input_ids) for rows in prompt] == [4, 4, 2]
    assert [rows.counts for rows in prompt] == [(0, 0, 0), (0, 0, 0), (1, 1, 1)]


def test_phases_are_said_and_never_follow_from_shapes() -> None:
    # The last chunk of the prompt is one row without drafts, as is every step of plain decoding.
    engine = known_engine([True])
    list(islice(steps(engine, [1, 2, 3, 4, 5], fixed(1, 0, 0, 0), 4), 3))
    assert [batch.phase for batch in engine.batches] == [Phase.PROMPT] * 2 + [Phase.DECODE] * 2
    assert [len(batch.rows[0].position_ids) for batch in engine.batches] == [4, 1, 1, 1]


def outputs_of(tree: Tree, logits: np.ndarray, request: DecodingState) -> HostOutputs:
    return HostOutputs(lay_out(tree, (), (), 0, wanted=request.choose.wanted), logits, logits[:0])


def request_for(drafter: Drafter, prompt: Sequence[int] = (1,), **options: object) -> DecodingState:
    return DecodingState(prompt, drafter, 8, DIMS.join_order, **options)  # type: ignore[arg-type]


def test_the_drawn_tree_is_verified_down_to_the_first_choice_that_no_child_holds() -> None:
    """The tree of `docs/architecture.md`, the base model's choices in brackets:

    the [cat] -+- cat [is] -+- sat
               |            +- is [9]
               +- dog
    """
    tree = EXAMPLE.TREE
    cat, is_ = tree.tokens[1], tree.tokens[4]
    logits = np.zeros((5, VOCAB), dtype=np.float32)
    for node, choice in ((0, cat), (1, is_), (4, 9)):
        logits[node, choice] = 1
    request = request_for(fixed(5, 0, 0, 0))
    assert verify(tree, outputs_of(tree, logits, request), request) == [0, 1, 4]
    assert request.tokens == [cat, is_, 9]


@given(trees(max_rows=8, vocab_size=8), st.integers(0, 1000))
def test_acceptance_follows_the_base_models_own_choices(tree: Tree, seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal((len(tree), 8)).astype(np.float32)
    request = request_for(fixed(8, 0, 0, 0))
    accepted = verify(tree, outputs_of(tree, logits, request), request)
    assert accepted[0] == 0
    for parent, child in pairwise(accepted):
        assert tree.parents[child] == parent
        assert tree.tokens[child] == logits[parent].argmax()
    token = request.tokens[-1]
    assert request.tokens == [*tree.tokens[accepted[1:]].tolist(), token]
    assert token == logits[accepted[-1]].argmax()
    assert tree.child(accepted[-1], token) is None


@given(st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), min_size=1, max_size=3), st.integers(0, 2))
def test_drafts_that_overflowed_are_none(values: list[float], first: int) -> None:
    engine = known_engine([True])
    right = engine.draft_logits
    calls = 0

    def overflowing(text: Text, step: int) -> np.ndarray:
        nonlocal calls
        calls += 1
        overflows = calls % (len(values) + 1) == first % (len(values) + 1)
        return np.resize(values, VOCAB).astype(np.float32) if overflows else right(text, step)

    found = islice(steps(KnownEngine(DIMS, engine.logits, overflowing), [1, 2, 3], fixed(6, 6, 6, 6)), 12)
    tokens = [token for certain in found for token in certain]
    assert tokens == plain([1, 2, 3], len(tokens))
    assert calls


@given(st.integers(1, 30), st.integers(0, VOCAB - 1), st.lists(st.booleans(), min_size=1, max_size=7))
def test_an_answer_ends_where_it_should_and_is_asked_about_each_token_once(
    count: int, stop: int, right: list[bool]
) -> None:
    asked: list[int] = []

    def ends(token: int) -> bool:
        asked.append(token)
        return token == stop

    found = list(steps(known_engine(right), [1, 2, 3], fixed(6, 6, 6, 6), 8, max_new_tokens=count, ends=ends))
    expected = plain([1, 2, 3], count)
    expected = expected[: expected.index(stop) + 1] if stop in expected else expected
    assert [token for certain in found for token in certain] == asked == expected


def test_the_loop_runs_nothing_itself_and_says_what_is_to_be_committed() -> None:
    request = request_for(fixed(4, 4, 4, 4), [1, 2, 3], max_new_tokens=2)
    engine = known_engine([True])
    decoding = decode(request)
    rows = next(decoding)
    assert isinstance(rows, Rows)
    assert rows.input_ids.tolist() == [1, 2, 3]
    # A pass that somebody else ran.
    outputs = run_one(engine, rows, engine.new_slot()).outputs(0)
    accepted = decoding.send(outputs)
    assert isinstance(accepted, Accepted)
    assert list(accepted.rows) == [0, 1, 2]
    assert (request.committed, request.tokens) == (3, plain([1, 2, 3], 1))
    offer = next(decoding)
    assert isinstance(offer, Offer)
    assert (offer.length, offer.drafted) == (3, True)
    # It is cut to whatever sizes it is sent.
    rows = decoding.send(TreeSizes(2, (1, 0, 0)))
    assert isinstance(rows, Rows)
    assert (len(rows.input_ids), rows.counts) == (2, (1, 0, 0))
