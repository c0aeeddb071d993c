from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.drafts import CorrectedDrafts, IndependentDrafts, TokenCorrection, corrected, most_probable
from runtime.errors import EngineFileError
from runtime.tree import best_first_tree
from tests.strategies import draft_steps

VOCAB = 20


def random_correction(seed: int, num_steps: int, scale: float = 1.0) -> TokenCorrection:
    rng = np.random.default_rng(seed)
    candidates, contexts = rng.standard_normal((2, VOCAB, 3)) * scale
    return TokenCorrection(candidates, contexts, rng.standard_normal((num_steps, 3)))


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_most_probable_is_the_head_of_a_sorted_softmax(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(12, 2000))
    logits = rng.integers(-4, 4, size).astype(np.float32)
    step = most_probable(logits, count)
    assert step.tokens.tolist() == sorted(range(size), key=lambda token: (-logits[token], token))[:count]
    softmax = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    np.testing.assert_allclose(step.probabilities, softmax[step.tokens], rtol=1e-5)


@given(st.integers(0, 1000), st.integers(0, VOCAB - 1), st.integers(1, VOCAB))
def test_a_correction_of_the_whole_vocabulary_is_that_of_the_logits(seed: int, before: int, count: int) -> None:
    logits = np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)
    correction = random_correction(seed, 1)
    found = CorrectedDrafts([most_probable(logits, VOCAB)], correction, count).after(0, before)
    raised = logits + correction.of(0, np.arange(VOCAB), before)
    softmax = np.exp(raised) / np.exp(raised).sum()
    assert found.tokens.tolist() == np.argsort(-softmax)[:count].tolist()
    np.testing.assert_allclose(found.probabilities, softmax[found.tokens], rtol=1e-4)


@given(draft_steps(), st.integers(1, 20))
def test_a_correction_of_nothing_changes_no_tree(drafts: IndependentDrafts, max_rows: int) -> None:
    nothing = TokenCorrection(np.zeros((VOCAB, 2)), np.ones((VOCAB, 2)), np.ones((len(drafts), 2)))
    plain = best_first_tree(7, drafts, max_rows)
    tree = best_first_tree(7, corrected(drafts, nothing, max_rows), max_rows)
    np.testing.assert_allclose(tree.probabilities, plain.probabilities)
    assert len(tree) == len(plain)


@given(draft_steps(), st.integers(1, 20), st.integers(0, 1000))
def test_a_corrected_tree_has_the_probabilities_of_its_own_paths(
    drafts: IndependentDrafts, max_rows: int, seed: int
) -> None:
    # Corrections far too large, as a damaged file may hold.
    found = corrected(drafts, random_correction(seed, len(drafts), scale=40.0), max_rows)
    tree = best_first_tree(7, found, max_rows)
    assert np.isfinite(tree.probabilities).all()
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        step = found.after(int(tree.depths[parent]), int(tree.tokens[parent]))
        rank = step.tokens.tolist().index(tree.tokens[node])
        assert tree.probabilities[node] == pytest.approx(tree.probabilities[parent] * step.probabilities[rank])


def test_tables_come_back_from_their_file(tmp_path: Path) -> None:
    correction = random_correction(0, 3)
    correction.write(tmp_path / "c.npy")
    found = TokenCorrection.read(tmp_path / "c.npy", VOCAB, 3)
    for step in range(3):
        expected = correction.of(step, np.arange(VOCAB), 5)
        np.testing.assert_allclose(found.of(step, np.arange(VOCAB), 5), expected, atol=2e-2)


def test_tables_that_do_not_fit(tmp_path: Path) -> None:
    random_correction(0, 3).write(tmp_path / "c.npy")
    with pytest.raises(EngineFileError, match=r"has the shape \[43, 3\] where 42 rows are expected"):
        TokenCorrection.read(tmp_path / "c.npy", VOCAB, 2)
    (tmp_path / "c.npy").write_bytes(b"junk")
    with pytest.raises(EngineFileError, match="is not a token correction"):
        TokenCorrection.read(tmp_path / "c.npy", VOCAB, 3)
