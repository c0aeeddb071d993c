"""The PyTorch reference against `transformers`, and the trainer's drafts against the reference."""

from typing import Any

import pytest
import torch

from ht_export.model.families import decoder_parts
from ht_export.model.reference import HiddenTransferModel
from ht_export.training.drafts import draft_hidden, run_context
from runtime.errors import InputError
from tests.conftest import random_transfer, tiny_llama

LAYERS = [(2, 2, 2), (3, 2, 1), (0, 4, 2), (4,), (1, 3)]


def empty_cache(batch: int) -> list[torch.Tensor]:
    return [torch.zeros(batch, 2, 0, 8) for _ in range(4)]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("tied", [True, False])
def test_without_pseudo_rows_the_logits_are_those_of_transformers(layers: tuple[int, ...], tied: bool) -> None:
    ids = torch.randint(3, 264, (2, 11), generator=torch.Generator().manual_seed(0))
    expected = tiny_llama(tie_word_embeddings=tied)(ids).logits
    model = HiddenTransferModel(tiny_llama(tie_word_embeddings=tied), random_transfer(layers))
    positions = torch.arange(11).expand(2, -1)
    output = model(
        ids,
        positions,
        torch.ones(11, 11).tril().bool().expand(2, -1, -1),
        [torch.zeros(2, 0, dtype=torch.int64)] * len(layers),
        positions,
        torch.zeros(2, dtype=torch.int64),
        empty_cache(2),
        empty_cache(2),
    )
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)


def test_a_chunk_over_the_cache_continues_the_text_and_rows_past_the_cache_length_are_not_read() -> None:
    ids = torch.randint(3, 264, (2, 11), generator=torch.Generator().manual_seed(0))
    expected = tiny_llama()(ids).logits
    model = HiddenTransferModel(tiny_llama(), random_transfer((2,)))
    none = [torch.zeros(2, 0, dtype=torch.int64)]

    def run(part: slice, keys: list[torch.Tensor], values: list[torch.Tensor], length: int) -> Any:
        rows = part.stop - part.start
        return model(
            ids[:, part],
            torch.arange(part.start, part.stop).expand(2, -1),
            torch.ones(rows, rows).tril().bool().expand(2, -1, -1),
            none,
            torch.arange(rows).expand(2, -1),
            torch.full((2,), length),
            keys,
            values,
        )

    first = run(slice(0, 7), empty_cache(2), empty_cache(2), 0)
    junk = torch.full((2, 2, 3, 8), 1e4)
    second = run(
        slice(7, 11),
        [torch.cat([key, junk], dim=2) for key in first.key_new],
        [torch.cat([value, junk], dim=2) for value in first.value_new],
        7,
    )
    torch.testing.assert_close(second.logits, expected[:, 7:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", LAYERS)
def test_the_trainers_drafts_are_those_of_the_reference(layers: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 264, (2, 9), generator=generator)
    anchors = torch.tensor([[3, 8], [5, 6]])
    base, transfer = tiny_llama(), random_transfer(layers)
    model = HiddenTransferModel(base, transfer)
    order, size, steps = transfer.join_order, 9, len(layers)
    rows = size + 2 * steps
    mask = torch.zeros(2, rows, rows, dtype=torch.bool)
    mask[:, :size, :size] = torch.ones(size, size).tril()
    positions = torch.cat([torch.arange(size).expand(2, -1), *(anchors + k + 1 for k in order)], dim=1)
    for b in range(2):
        for i, step in enumerate(order):
            for a in range(2):
                row = size + 2 * i + a
                mask[b, row, : anchors[b, a] + 1] = True
                for j, other in enumerate(order):
                    mask[b, row, size + 2 * j + a] = other <= step
    output = model(
        ids,
        positions,
        mask,
        [anchors] * steps,
        anchors,
        torch.zeros(2, dtype=torch.int64),
        empty_cache(2),
        empty_cache(2),
    )
    parts = decoder_parts(base)
    hidden = draft_hidden(base, transfer, run_context(base, transfer.layers, ids), anchors)
    drafts = parts.head(parts.norm(hidden))
    for i, step in enumerate(order):
        torch.testing.assert_close(output.draft_logits[:, 2 * i : 2 * i + 2], drafts[:, :, step], atol=2e-5, rtol=1e-5)


def test_an_untrained_draft_at_the_last_layer_is_the_base_models_own_prediction() -> None:
    ids = torch.randint(3, 264, (1, 6), generator=torch.Generator().manual_seed(0))
    base = tiny_llama()
    model = HiddenTransferModel(base, random_transfer((4,)))
    torch.nn.init.eye_(model.transfer.linears[0].weight)
    torch.nn.init.zeros_(model.transfer.linears[0].bias)
    output = model(
        ids,
        torch.arange(7)[None],
        torch.ones(7, 7).tril().bool()[None],
        [torch.tensor([[5]])],
        torch.tensor([[5]]),
        torch.zeros(1, dtype=torch.int64),
        empty_cache(1),
        empty_cache(1),
    )
    torch.testing.assert_close(output.draft_logits, output.logits)


def test_a_transfer_layer_past_the_last_one_is_refused() -> None:
    with pytest.raises(InputError, match=r"transfer layer 5 does not exist in a model of 4 layers"):
        HiddenTransferModel(tiny_llama(), random_transfer((2, 5)))
