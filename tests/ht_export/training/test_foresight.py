from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ht_export.model.checkpoint import BaseModel
from ht_export.training.data import AnsweredPrompt
from ht_export.training.foresight import TOP_P, _fitted, _nucleus, _races, fit_foresight
from runtime.drafting.drafts import DraftStep, most_probable
from runtime.drafting.foresight import Foresight
from runtime.sampling.candidates import candidates
from tests.conftest import random_transfer

VOCAB = 64


def rows(count: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, VOCAB)) * spread).float()


def shortlists(logits: torch.Tensor, count: int = VOCAB) -> list[DraftStep]:
    return [most_probable(row, count) for row in logits.numpy()]


def test_drafts_that_are_the_base_model_are_fully_trusted() -> None:
    rng = np.random.default_rng(0)
    logits = rows(1500, 0, 1.0)
    found = _fitted(0, [_races(shortlists(logits), logits, 1.0, rng)])
    assert found["power"] > 0.9
    assert found["trust"] > 0.9
    # A quarter of what guessing by drafts alone would lose.
    assert found["log_loss"] < 0.8


def test_the_further_drafts_are_off_the_less_their_race_is_trusted() -> None:
    logits = rows(1500, 1)
    trusts, losses = [], []
    for off in (0.5, 1.5, 4.0):
        drafts = shortlists(logits + rows(1500, 2, off), 16)
        found = _fitted(0, [_races(drafts, logits, 1.0, np.random.default_rng(3))])
        trusts.append(found["trust"])
        losses.append(found["log_loss"])
    assert trusts[0] > trusts[1] > trusts[2] >= 0
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_the_nucleus_is_that_of_sampling(temperature: float) -> None:
    logits = rows(50, 4)
    found = _nucleus(logits.double(), temperature).numpy()
    for row, probabilities in zip(logits.numpy() / np.float32(temperature), found, strict=True):
        tokens, weights = candidates(row, float(row.max()), top_p=TOP_P)
        assert tokens is not None
        np.testing.assert_array_equal(np.flatnonzero(probabilities), np.sort(tokens))
        np.testing.assert_allclose(probabilities[tokens], weights / weights.sum(), rtol=1e-4)


def test_transfer_layers_get_foresight_for_each_step_and_temperature(
    base: BaseModel, sequences: list[AnsweredPrompt]
) -> None:
    transfer = random_transfer((1, 1, 2))
    found = fit_foresight(base, transfer, sequences, temperatures=(0.5, 1.0))
    assert json.loads(json.dumps(found)) == found
    assert found == fit_foresight(base, transfer, sequences, temperatures=(0.5, 1.0))
    assert [one["temperature"] for one in found] == [0.5, 1.0]
    assert all(len(one["steps"]) == 3 for one in found)
    foresight = Foresight.of({"foresight": found})
    assert len(foresight.at(0.7)) == 3


def test_a_long_text_has_logits_for_64_anchors_at_a_time(base: BaseModel) -> None:
    rows: list[int] = []
    head = base.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, given, made: rows.append(made[..., 0].numel()))
    try:
        found = fit_foresight(base, random_transfer((1, 2)), [AnsweredPrompt("0", "", [1], list(range(3, 203)))])
    finally:
        hook.remove()
    assert len(found[0]["steps"]) == 2
    # Drafts are two rows an anchor, and the base model's own rows one, with those after the last anchor.
    assert sum(rows) == 2 * 198 + 198 + 4
    assert max(rows) == 2 * 64
