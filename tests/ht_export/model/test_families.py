"""Every supported family, with each of its switches: the PyTorch reference against `transformers`, the drafts of
training against the reference, and engines.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ht_export.model.checkpoint import load_base_model
from ht_export.model.families import FAMILIES, decoder_parts, fix_frequencies, head_dim
from ht_export.model.reference import HiddenTransferModel
from ht_export.training.drafts import draft_hidden, run_context
from runtime import Generator
from runtime.bundle.engine_file import read_engine_file
from tests.conftest import random_transfer
from tests.families import MODELS, tiny_model

LENGTH = 21
PROMPT = "The quick brown fox, and 2 dogs."


def run(model: HiddenTransferModel, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the logits of the whole text, run in chunks over a cache."""
    config = model.base.config
    empty = torch.zeros(len(ids), config.num_key_value_heads, 0, head_dim(config))
    keys = values = [empty] * config.num_hidden_layers
    found = []
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        rows = part.shape[1]
        output = model(
            part,
            torch.arange(start, start + rows).expand(len(ids), -1),
            torch.ones(rows, rows).tril().bool().expand(len(ids), -1, -1),
            [torch.zeros(len(ids), 0, dtype=torch.int64)] * model.transfer.num_steps,
            torch.arange(rows).expand(len(ids), -1),
            torch.full((len(ids),), start),
            keys,
            values,
        )
        keys = [torch.cat(pair, dim=2) for pair in zip(keys, output.key_new, strict=True)]
        values = [torch.cat(pair, dim=2) for pair in zip(values, output.value_new, strict=True)]
        found.append(output.logits)
    return torch.cat(found, dim=1)


def text() -> torch.Tensor:
    return torch.randint(3, 264, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def test_every_family_is_tested() -> None:
    assert {model_type for model_type, _ in MODELS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_transformers(name: str) -> None:
    base = tiny_model(name)
    expected = base(text()).logits
    assert expected.std() > 0.05
    fix_frequencies(base, LENGTH)
    model = HiddenTransferModel(base, random_transfer((1, 1), base.config.hidden_size))
    for chunk in (LENGTH, 8):
        torch.testing.assert_close(run(model, text(), chunk), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_text_without_rows_is_that_of_transformers(name: str) -> None:
    base = tiny_model(name)
    expected = base.generate(text(), max_new_tokens=9, do_sample=False)
    HiddenTransferModel(base, random_transfer((1, 1), base.config.hidden_size))
    assert base.generate(text(), max_new_tokens=9, do_sample=False).tolist() == expected.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_the_drafts_of_training_are_those_of_the_reference(name: str) -> None:
    base = tiny_model(name)
    transfer = random_transfer((1, 0), base.config.hidden_size)
    model = HiddenTransferModel(base, transfer)
    anchor, rows = torch.tensor([[LENGTH - 1]] * 2), LENGTH + 2
    mask = torch.ones(rows, rows).tril().bool().expand(2, -1, -1)
    # Step 2 joins first; step 1, the row after it, stands before it in the text.
    mask = mask.clone()
    mask[:, LENGTH, LENGTH + 1], mask[:, LENGTH + 1, LENGTH] = True, False
    positions = torch.arange(rows)
    positions[LENGTH:] = torch.tensor([LENGTH + 1, LENGTH])
    config = base.config
    empty = [torch.zeros(2, config.num_key_value_heads, 0, head_dim(config))] * config.num_hidden_layers
    output = model(
        text(),
        positions.expand(2, -1),
        mask,
        [anchor, anchor],
        anchor,
        torch.zeros(2, dtype=torch.int64),
        empty,
        empty,
    )
    parts = decoder_parts(base)
    hidden = draft_hidden(base, transfer, run_context(base, transfer.layers, text()), anchor)
    drafts = parts.head(parts.norm(hidden))[:, 0]
    torch.testing.assert_close(output.draft_logits, drafts.flip(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_an_engine_writes_the_text_of_transformers(name: str, family_engine: Callable[[str], Path]) -> None:
    folder = family_engine(name)
    loaded, out = load_base_model(str(folder / "model")), folder / "engine.onnx"
    about = read_engine_file(out)
    assert about.parity["largest_relative_difference"] < 1e-4
    assert about.parity["of_the_cpu_graph"] < 1e-4
    generator = Generator(out, threads=1, adapt=False)
    ids = generator.encode(PROMPT, raw=True)
    expected = loaded.model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    assert generator.generate(PROMPT, raw=True, max_new_tokens=24, speculate=False).tokens == expected
    found = generator.generate(PROMPT, raw=True, max_new_tokens=24)
    assert found.tokens == expected
