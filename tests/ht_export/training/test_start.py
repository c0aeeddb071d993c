"""A fit that begins with transfer layers trained before, of as many draft steps or fewer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ht_export.model.checkpoint import BaseModel
from ht_export.model.transfer import TransferFile, TransferLayers, load_transfer_layers, save_transfer_layers
from ht_export.training import cli
from ht_export.training.data import AnsweredPrompt
from ht_export.training.settings import FitSettings
from ht_export.training.start import copy_start
from runtime.errors import InputError
from tests.ht_export.training.test_fit import assert_equal, run

LONGER = FitSettings(
    layers=(2, 3, 3), steps=1, sequences=4, anchors=8, init="file", correction_rank=4, learning_rate=1e-12
)
SHORT = ["--correction-rank", "4", "--sequences", "4", "--anchors", "8", "--dtype", "float32"]


@pytest.fixture
def trained() -> TransferLayers:
    """Transfer layers of two steps, with a correction, that no initialisation gives."""
    torch.manual_seed(7)
    transfer = TransferLayers((2, 3), 32, 4)
    for parameter in transfer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return transfer


def test_the_steps_that_are_there_are_taken_and_the_others_regressed(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path, trained: TransferLayers
) -> None:
    longer = run(base, sequences, tmp_path / "longer", LONGER, start=trained)
    regressed = run(base, sequences, tmp_path / "regressed", replace(LONGER, init="ridge"))
    assert longer.correction and trained.correction
    for k in range(2):
        torch.testing.assert_close(longer.linears[k].weight, trained.linears[k].weight)
        torch.testing.assert_close(longer.linears[k].bias, trained.linears[k].bias)
    torch.testing.assert_close(longer.linears[2].weight, regressed.linears[2].weight)
    torch.testing.assert_close(longer.linears[2].bias, regressed.linears[2].bias)
    scales = trained.correction.scales
    torch.testing.assert_close(longer.correction.scales, torch.stack([scales[0], scales[1], scales[1]]))
    torch.testing.assert_close(longer.correction.inner.weight, trained.correction.inner.weight)


def test_a_correction_of_greater_rank_begins_as_that_of_the_file(trained: TransferLayers) -> None:
    wider = TransferLayers((2, 3, 3), 32, 7)
    copy_start(wider, trained)
    assert wider.correction and trained.correction
    embeddings = torch.randn(5, 32)
    for k, step in enumerate((0, 1, 1)):
        torch.testing.assert_close(wider.correction(k, embeddings), trained.correction(step, embeddings))
    # What is new takes part in training: it hears something, and adds it with a weight of zero.
    assert wider.correction.contexts(embeddings)[:, 4:].abs().min() > 0
    wider.correction(0, embeddings).sum().backward()
    assert wider.correction.candidates.weight.grad is not None
    assert wider.correction.candidates.weight.grad[:, 4:].abs().min() > 0


def test_a_longer_fit_from_a_file_that_was_interrupted_ends_with_the_same_weights(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path, trained: TransferLayers
) -> None:
    settings = replace(LONGER, steps=12, learning_rate=0.01, draft_size=40)
    whole = run(base, sequences, tmp_path / "whole", settings, start=trained)
    assert whole.draft_size == 40

    def dies(text: str) -> None:
        if text.startswith("step 8"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, sequences, tmp_path / "killed", settings, start=trained, report=dies, checkpoint_every=4)
    with safe_open(tmp_path / "killed", framework="pt") as file:
        assert file.get_tensor("weight/maps.2.weight").shape == (32, 32)
    assert_equal(whole, run(base, sequences, tmp_path / "killed", settings, start=trained))
    other = TransferLayers((2,), 32, 4)
    with pytest.raises(InputError, match="is the checkpoint of a run with another start"):
        run(base, sequences, tmp_path / "killed", settings, start=other)


@pytest.mark.parametrize(("layers", "rank"), [((3, 2, 3), 4), ((2, 2), 4), ((2,), 4), ((2, 3, 3), 3), ((2, 3, 3), 0)])
def test_a_start_of_other_layers_or_of_more_steps_is_one_clear_error(
    base: BaseModel,
    sequences: list[AnsweredPrompt],
    tmp_path: Path,
    trained: TransferLayers,
    layers: tuple[int, ...],
    rank: int,
) -> None:
    settings = replace(LONGER, layers=layers, correction_rank=rank)
    with pytest.raises(InputError, match=r"rank \(\(2, 3\), 32, 4\), and .* are asked for; leave .* or name theirs"):
        run(base, sequences, tmp_path / "c", settings, start=trained)


def test_too_little_data_for_a_further_step_names_no_option_that_would_be_refused(
    base: BaseModel, tmp_path: Path, trained: TransferLayers
) -> None:
    few = [AnsweredPrompt("0", "", [5, 6, 7], [8, 9, 10, 11, 12])]
    told = r"has 1 positions .* of 33 unknowns; answer more prompts, or at greater length \(--max-new-tokens\)$"
    with pytest.raises(InputError, match=told):
        run(base, few, tmp_path / "c", LONGER, start=trained)


def test_the_command_names_further_layers_behind_those_of_the_file(
    base: BaseModel, tiny_checkpoint: Path, data_folder: Path, tmp_path: Path, trained: TransferLayers
) -> None:
    old, out = tmp_path / "old.safetensors", tmp_path / "out.safetensors"
    save_transfer_layers(old, trained, TransferFile(base.identity()))
    where = ["fit", str(tiny_checkpoint), "--data", str(data_folder), "--start", str(old), "--out", str(out)]
    still = ["--steps", "1", "--learning-rate", "1e-12", "--draft-size", "40", *SHORT]
    assert cli.main([*where, "--layers", "2,3,3", *still]) == 0
    longer, about = load_transfer_layers(out)
    assert longer.layers == (2, 3, 3)
    assert longer.draft_size == 40
    assert about.recipe["init"] == "file"
    torch.testing.assert_close(longer.linears[1].weight.data, trained.linears[1].weight.data)
