import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.drafting.best_first import best_first_tree
from runtime.drafting.correction import CorrectedDrafts, TokenCorrection, corrected
from runtime.drafting.drafts import AdjustedDrafts, DraftStep, IndependentDrafts, most_probable
from runtime.drafting.transfer_drafts import tempered
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
    raised = logits + correction.after(correction.rows(0, np.arange(VOCAB)), before)
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


@given(draft_steps(), st.integers(0, 1000))
def test_adjusted_drafts_are_adjusted_by_step_after_every_token(drafts: IndependentDrafts, seed: int) -> None:
    found = corrected(drafts, random_correction(seed, len(drafts)), 4)
    asked: list[int] = []

    def adjust(step: int, candidates: DraftStep) -> DraftStep:
        asked.append(step)
        return DraftStep(candidates.tokens, candidates.probabilities / (step + 2))

    adjusted = AdjustedDrafts(found, adjust)
    assert len(adjusted) == len(drafts)
    places = [(step, token) for step in range(len(drafts)) for token in range(3)]
    for step, token in places * 2:
        before, after = found.after(step, token), adjusted.after(step, token)
        assert after.tokens.tolist() == before.tokens.tolist()
        np.testing.assert_allclose(after.probabilities, before.probabilities / (step + 2))
    assert asked == [step for step, _ in places], "candidates are adjusted once, though asked for again and again"


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp((logits - logits.max()).astype(np.float64))
    return raised / raised.sum()


temperatures = st.floats(0.05, 20.0)


def some_logits(seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * 2).astype(np.float32)


@given(st.integers(0, 1000), temperatures)
def test_tempered_drafts_of_the_whole_vocabulary_are_the_softmax_at_that_temperature(
    seed: int, temperature: float
) -> None:
    logits = some_logits(seed)
    found = tempered(most_probable(logits, VOCAB), temperature)
    np.testing.assert_allclose(found.probabilities, softmax(logits / temperature)[found.tokens], rtol=1e-4, atol=1e-12)


@given(st.integers(0, 1000), temperatures, st.integers(1, VOCAB))
def test_of_tokens_off_the_shortlist_as_much_is_assumed_as_must_be(seed: int, temperature: float, count: int) -> None:
    logits = some_logits(seed)
    found = tempered(most_probable(logits, count), temperature)
    whole = softmax(logits / temperature)[found.tokens]
    # Below 1, the rest weighs most where it is on as few tokens as can be, each like the last; above 1, least.
    if temperature <= 1:
        assert (found.probabilities <= whole * (1 + 1e-4)).all()
    else:
        assert (found.probabilities >= whole * (1 - 1e-4)).all()


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 10.0, 100.0])
@given(st.integers(0, 2**32 - 1), st.integers(1, 64), st.sampled_from([0.0, 0.01, 1.0, 30.0, 1000.0]))
def test_tempered_drafts_are_falling_probabilities_at_any_temperature(
    temperature: float, seed: int, count: int, spread: float
) -> None:
    # From all tokens equally probable to one that leaves the others nothing that a float could hold.
    logits = (np.random.default_rng(seed).standard_normal(5000) * spread).astype(np.float32)
    step = most_probable(logits, count)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = tempered(step, temperature)
    assert found.tokens.tolist() == step.tokens.tolist()
    assert np.isfinite(found.probabilities).all()
    assert (np.diff(found.probabilities) <= 0).all()
    assert 0 < found.probabilities.sum() <= 1 + 1e-9
