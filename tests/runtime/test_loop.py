"""The loop against an engine whose base model and drafts are known functions of the text."""

from itertools import islice, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.bindings import GraphDims
from runtime.cache import KeyValueCache
from runtime.drafter import Drafter
from runtime.drafts import TokenCorrection
from runtime.engines import Outputs
from runtime.loop import draft_and_verify, greedy, verify
from runtime.ngrams import Ngrams
from runtime.sizing import FixedSizes
from runtime.tree import Rows, Tree, TreeSizes
from tests.strategies import trees

VOCAB = 11


def next_token(text: tuple[int, ...]) -> int:
    return (sum(text[-3:]) * 7 + len(text)) % VOCAB


class KnownEngine:
    """A base model that continues every text by `next_token`; its cache holds the tokens themselves.

    A draft is right when `right(position)` says so, and otherwise puts the right token second.
    """

    def __init__(self, right: list[bool]) -> None:
        self.dims = GraphDims(1, 1, 1, 1, 1, VOCAB, (0, 0, 0))
        self.right = right
        self.passes = 0

    def new_cache(self) -> KeyValueCache:
        return KeyValueCache(self.dims)

    def run(self, rows: Rows, cache: KeyValueCache) -> Outputs:
        self.passes += 1
        past = tuple(cache.keys[0, 0, 0, : cache.length, 0].astype(int))
        size = len(rows.input_ids)
        texts = [(*past, *rows.input_ids[rows.tree_mask[row, :size]]) for row in range(size)]
        logits = np.zeros((len(rows.logit_rows), VOCAB), dtype=np.float32)
        for index, row in enumerate(rows.logit_rows):
            assert rows.position_ids[row] == len(texts[row]) - 1
            logits[index, next_token(texts[row])] = 1
        drafts = []
        for step, parents in enumerate(rows.pseudo_parents, start=1):
            for parent in parents:
                text = texts[parent]
                for _ in range(step):
                    text = (*text, next_token(text))
                draft = np.zeros(VOCAB, dtype=np.float32)
                draft[next_token(text)] = 5
                if not self.right[len(text) % len(self.right)]:
                    draft[(next_token(text) + 1) % VOCAB] = 6
                drafts.append(draft)
        keys = rows.input_ids.astype(np.float32).reshape(1, 1, size, 1)
        return Outputs(logits, np.array(drafts).reshape(-1, VOCAB).astype(np.float32), [keys], [keys])


def random_correction(seed: int) -> TokenCorrection:
    rng = np.random.default_rng(seed)
    return TokenCorrection(*rng.standard_normal((2, VOCAB, 2)), rng.standard_normal((3, 2)))


def fixed(tree_rows: int, *pseudo_rows: int) -> Drafter:
    return Drafter(FixedSizes(TreeSizes(tree_rows, pseudo_rows)))


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
    engine = KnownEngine(right)
    sizes = TreeSizes(tree_rows, pseudo_rows)
    steps = islice(
        draft_and_verify(
            engine, prompt, Drafter(FixedSizes(sizes), correction, ngrams=Ngrams() if ngrams else None), chunk
        ),
        15,
    )
    tokens = [token for certain in steps for token in certain]
    assert tokens == plain(prompt, len(tokens))


def test_right_drafts_give_one_more_token_than_there_are_draft_steps() -> None:
    engine = KnownEngine([True])
    steps = list(islice(draft_and_verify(engine, [1, 2, 3], fixed(4, 4, 4, 4), 8), 6))
    assert [len(certain) for certain in steps] == [1, 4, 4, 4, 4, 4]
    assert engine.passes == 6


def test_plain_decoding_makes_one_token_certain_in_each_pass() -> None:
    engine = KnownEngine([True])
    steps = list(islice(draft_and_verify(engine, [1, 2, 3], fixed(1, 0, 0, 0), 8), 6))
    assert [len(certain) for certain in steps] == [1] * 6


def test_a_prompt_is_run_in_chunks_and_only_its_end_drafts() -> None:
    engine = KnownEngine([True])
    next(draft_and_verify(engine, list(range(10)), fixed(4, 4, 4, 4), 4))
    assert engine.passes == 3


@given(trees(max_rows=8, vocab_size=8), st.integers(0, 1000))
def test_acceptance_follows_the_base_models_own_choices(tree: Tree, seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal((len(tree), 8)).astype(np.float32)
    accepted, token, _ = verify(tree, logits, greedy)
    assert accepted[0] == 0
    for parent, child in pairwise(accepted):
        assert tree.parents[child] == parent
        assert tree.tokens[child] == logits[parent].argmax()
    assert token == logits[accepted[-1]].argmax()
    assert tree.child(accepted[-1], token) is None


@given(st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), min_size=1, max_size=3), st.integers(0, 2))
def test_drafts_that_overflowed_are_none(values: list[float], first: int) -> None:
    class Overflowing(KnownEngine):
        def run(self, rows: Rows, cache: KeyValueCache) -> Outputs:
            outputs = super().run(rows, cache)
            drafts = np.array(outputs.draft_logits)
            drafts[first :: len(values) + 1] = np.resize(values, VOCAB)
            return Outputs(outputs.logits, drafts, outputs.key_new, outputs.value_new)

    steps = islice(draft_and_verify(Overflowing([True]), [1, 2, 3], fixed(6, 6, 6, 6), 8), 12)
    tokens = [token for certain in steps for token in certain]
    assert tokens == plain([1, 2, 3], len(tokens))


@given(st.integers(1, 30), st.integers(0, VOCAB - 1), st.lists(st.booleans(), min_size=1, max_size=7))
def test_an_answer_ends_where_it_should_and_is_asked_about_each_token_once(
    count: int, stop: int, right: list[bool]
) -> None:
    asked: list[int] = []

    def ends(token: int) -> bool:
        asked.append(token)
        return token == stop

    steps = list(draft_and_verify(KnownEngine(right), [1, 2, 3], fixed(6, 6, 6, 6), 8, greedy, count, ends))
    expected = plain([1, 2, 3], count)
    expected = expected[: expected.index(stop) + 1] if stop in expected else expected
    assert [token for certain in steps for token in certain] == asked == expected
