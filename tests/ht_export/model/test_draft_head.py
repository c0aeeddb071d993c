"""Drafts read by some rows of the base model's head: what they are is what the whole head says of those tokens."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ht_export.model.correction import correction_tables
from ht_export.model.families import decoder_parts
from ht_export.model.reference import HiddenTransferModel
from ht_export.verify.passes import ReferenceEngine, record
from tests.conftest import DRAFT_TOKENS, random_transfer
from tests.families import tiny_model

# Heads of their own and tied ones, a factor of the logits, a divisor, a soft cap, and biases, which no family has.
FAMILIES = ["llama", "llama, tied head", "cohere", "granite", "gemma2", "biases of the head"]


def model_of(name: str) -> PreTrainedModel:
    if name != "biases of the head":
        return tiny_model(name)
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(5)
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.randn(264, generator=generator), requires_grad=False)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_draft_logits_are_those_of_the_whole_head_for_the_draft_tokens(name: str) -> None:
    base = model_of(name)
    layers, width = (1, 0, 1), base.config.hidden_size
    whole, part = (
        record(ReferenceEngine(HiddenTransferModel(base, random_transfer(layers, width, draft_tokens=tokens)).eval()))
        for tokens in (None, DRAFT_TOKENS)
    )
    for one, other in zip(whole, part, strict=True):
        np.testing.assert_allclose(other.outputs.logits, one.outputs.logits, rtol=1e-5, atol=1e-6)
        assert other.outputs.draft_logits.shape[1] == len(DRAFT_TOKENS)
        expected = one.outputs.draft_logits[:, DRAFT_TOKENS]
        np.testing.assert_allclose(other.outputs.draft_logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "cohere", "biases of the head"])
def test_a_correction_has_tables_for_the_draft_tokens_alone(name: str) -> None:
    base = model_of(name)
    network = random_transfer((1, 0, 1), base.config.hidden_size, correction_rank=4).correction
    assert network is not None
    tokens = torch.tensor(DRAFT_TOKENS)
    found, whole = correction_tables(base, network, tokens), correction_tables(base, network)
    np.testing.assert_array_equal(found.contexts, whole.contexts)
    # Less what all of them have in common, which a softmax over them does not see.
    expected = whole.candidates[DRAFT_TOKENS] - whole.candidates[DRAFT_TOKENS].mean(0)
    np.testing.assert_allclose(found.candidates[DRAFT_TOKENS], expected, atol=1e-5)
    others = np.setdiff1d(np.arange(264), DRAFT_TOKENS)
    assert not found.candidates[others].any()
    # What it adds is what the network's vectors add to logits.
    head = decoder_parts(base).head_of(tokens)
    states = torch.randn(1, base.config.hidden_size)
    added = head(states + network(2, decoder_parts(base).embed(torch.tensor([7])))) - head(states)
    rows = found.rows(2, np.array(DRAFT_TOKENS))
    np.testing.assert_allclose(rows @ found.contexts[7], (added - added.mean())[0], atol=1e-4)


def test_a_head_in_half_precision_gives_the_same_tables_as_widened() -> None:
    base = tiny_model("llama, tied head").to(torch.bfloat16)
    network = random_transfer((1, 0, 1), base.config.hidden_size, correction_rank=4).correction
    assert network is not None
    tokens = torch.tensor(DRAFT_TOKENS)
    found, expected = (correction_tables(model, network, tokens) for model in (base, base.to(torch.float32)))
    np.testing.assert_allclose(found.candidates, expected.candidates, atol=1e-6)
