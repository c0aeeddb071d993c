import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ht_export.export import ExportSettings
from ht_export.model.checkpoint import BaseModel
from ht_export.model.correction import correction_tables
from ht_export.model.reference import HiddenTransferModel
from ht_export.model.transfer import TransferLayers
from ht_export.training.cost import RowCosts, best_choice
from ht_export.training.data import AnsweredPrompt
from ht_export.training.evaluate import evaluate, predict, statistics
from ht_export.training.simulate import TextDrafts, advances, tokens_per_step
from ht_export.verify.passes import ReferenceEngine
from runtime.drafting.drafter import Drafter
from runtime.drafting.sizing import FixedSizes
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.errors import InputError
from runtime.tree import TreeSizes
from tests.conftest import random_transfer
from tests.runtime.known_engine import steps


def test_acceptance_counts_the_greedy_token_of_every_position(base: BaseModel, sequences: list[AnsweredPrompt]) -> None:
    # W = identity at the last layer repeats the base model's own prediction: its top-1 at step 1 is the share of
    # positions whose token equals the one after it.
    repeats = [
        s.tokens[i + 2] == s.tokens[i + 1] for s in sequences for i in range(len(s.prompt) - 1, len(s.tokens) - 2)
    ]
    measured = evaluate(base, TransferLayers((4,), 32), sequences)
    assert measured["anchors"] == len(repeats)
    assert measured["top"]["1"][0] == pytest.approx(sum(repeats) / len(repeats), abs=1e-3)
    assert sum(task["anchors"] for task in measured["tasks"].values()) == len(repeats)


@pytest.mark.parametrize(
    "sizes", [TreeSizes(1, (0, 0, 0)), TreeSizes(6, (6, 6, 6)), TreeSizes(6, (4, 2, 1)), TreeSizes(8, (3, 0, 0))]
)
@pytest.mark.parametrize("rank", [0, 4])
def test_simulated_steps_are_those_of_the_loop(
    base: BaseModel, sequences: list[AnsweredPrompt], sizes: TreeSizes, rank: int
) -> None:
    transfer = random_transfer((3, 1, 3), correction_rank=rank)
    correction = correction_tables(base.model, transfer.correction) if transfer.correction else None
    engine = ReferenceEngine(HiddenTransferModel(base.model, transfer))
    for text, sequence in zip(predict(base, transfer, sequences), sorted(sequences, key=len), strict=True):
        simulated = list(advances(text, sizes))
        loop = steps(engine, sequence.prompt, Drafter(FixedSizes(sizes), [TransferDrafts(correction)]), chunk=64)
        assert next(loop) == sequence.answer[:1]
        lengths = [len(next(loop)) for _ in simulated]
        assert lengths == simulated


def drafts_of(labels: list[list[int]], tokens: list[list[list[int]]], probability: float = 0.5) -> TextDrafts:
    candidates = np.array(tokens)
    return TextDrafts(
        candidates, np.full(candidates.shape, probability), np.array(labels), np.zeros(len(labels), np.int64), None
    )


def test_drafts_that_are_always_right_make_every_step_full() -> None:
    text = drafts_of([[1, 2]] * 9, [[[1], [2]]] * 9)
    assert tokens_per_step([text], TreeSizes(3, (3, 3))) == 3.0
    assert tokens_per_step([text], TreeSizes(2, (2, 2))) == 2.0
    assert tokens_per_step([text], TreeSizes(3, (3, 0))) == 2.0


def test_an_accepted_node_without_pseudo_rows_makes_the_next_step_plain() -> None:
    # One pseudo row goes to the likeliest end; the draft thinks that its second node is one, with 0.9.
    text = drafts_of([[1]] * 4, [[[1]]] * 4, probability=0.9)
    assert list(advances(text, TreeSizes(2, (1,)))) == [2, 2]
    unlikely = drafts_of([[1]] * 4, [[[1]]] * 4, probability=0.2)
    assert list(advances(unlikely, TreeSizes(2, (1,)))) == [2, 1, 2]


@given(st.integers(0, 1000), st.integers(1, 12))
def test_more_rows_never_bring_fewer_tokens_from_the_same_position(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = np.stack([np.stack([rng.permutation(20)[:6] for _ in range(3)]) for _ in range(5)])
    probabilities = -np.sort(-rng.dirichlet(np.ones(6), (5, 3)), axis=-1)
    text = TextDrafts(tokens, probabilities, rng.integers(0, 20, (5, 3)), np.zeros(5, np.int64), None)
    fewer, more = (next(iter(advances(text, TreeSizes(n, (n,) * 3)))) for n in (rows, rows + 1))
    assert 1 <= fewer <= more <= 4


def test_the_statistics_are_conditional_on_the_steps_before(base: BaseModel, sequences: list[AnsweredPrompt]) -> None:
    texts = list(predict(base, random_transfer((2, 3), correction_rank=4), sequences))
    found = statistics(texts, TreeSizes(4, (4, 2)))
    hits = np.concatenate([text.hits for text in texts])[:, :, :16]
    before = hits[:, 0].any(-1)
    assert found["ranks"][0] == pytest.approx(hits[:, 0].mean(0).tolist(), abs=1e-4)
    assert found["ranks"][1] == pytest.approx(hits[before, 1].mean(0).tolist(), abs=1e-4)
    assert sum(entry["count"] for entry in found["calibration"][1]["bins"]) == before.sum() * 16
    assert set(found["top_uncorrected"]) == {"1", "2", "4", "8"}
    assert found["top_uncorrected"] != found["top"]
    assert list(found["tokens_per_step"]) == ["2", "4", "8", "16", "32", "64"]
    assert found["sizes"]["tokens_per_step"] == pytest.approx(tokens_per_step(texts, TreeSizes(4, (4, 2))), abs=1e-4)
    assert ExportSettings().tree(2) == TreeSizes(4, (4, 2))


def test_dear_rows_make_plain_decoding_the_best_choice_and_free_ones_the_largest_tree(base: BaseModel) -> None:
    text = drafts_of([[1, 2]] * 20, [[[1, 3], [2, 4]]] * 20)
    dear = best_choice([text], (2, 2), RowCosts.of(base, 1.0))
    free = best_choice([text], (2, 2), RowCosts.of(base, 0.0))
    assert free.speedup == 3.0
    assert dear.speedup < free.speedup
    hopeless = drafts_of([[9, 9]] * 20, [[[1, 3], [2, 4]]] * 20)
    assert best_choice([hopeless], (2, 2), RowCosts.of(base, 0.05)).sizes == TreeSizes.plain(2)
    with pytest.raises(InputError, match="must be between 0 and 1 plain passes, not 5"):
        RowCosts.of(base, 5)


def test_a_pseudo_row_costs_the_layers_that_it_passes_and_the_head(base: BaseModel) -> None:
    costs = RowCosts.of(base, 0.1)
    whole = costs.num_layers * costs.layer_parameters + costs.head_parameters
    assert costs.pseudo_row(0) == 1
    assert costs.pseudo_row(4) == costs.head_parameters / whole
    assert costs.of_pass((4, 0), TreeSizes(3, (0, 2))) == pytest.approx(1 + 0.1 * (2 + 2))
