"""Medusa heads, trained by the tool that trains transfer layers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div

from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.families import decoder_parts
from ht_export.model.transfer import MedusaHeads, load_transfer_layers
from ht_export.training import cli
from ht_export.training.batches import make_batch
from ht_export.training.data import AnsweredPrompt
from ht_export.training.evaluate import predict
from ht_export.training.features import FeatureCache
from ht_export.training.losses import Objective, draft_losses
from ht_export.training.settings import FitSettings
from runtime.errors import InputError
from tests.conftest import random_transfer
from tests.ht_export.training.conftest import QUIET
from tests.ht_export.training.test_fit import SETTINGS, losses_of, run

MEDUSA = replace(SETTINGS, layers=(4, 4), correction_rank=0, drafter="medusa")
SHORT = ["--steps", "2", "--sequences", "2", "--anchors", "4", "--dtype", "float32"]


def test_drafts_behind_the_norm_are_read_as_they_are(base: BaseModel) -> None:
    parts = decoder_parts(base.model)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, 32, generator=generator)
    drafts = torch.randn(7, 2, 32, generator=generator, requires_grad=True)
    targets = torch.randint(0, 9, (7, 2), generator=generator)
    found = draft_losses(parts, drafts.detach(), states, targets, Objective((1.0, 1.0)), behind_norm=True)
    wanted = parts.head(parts.norm(states)).softmax(-1)
    logs = parts.head(drafts).log_softmax(-1)
    by_step = torch.stack([kl_div(logs[:, k], wanted[targets[:, k]], reduction="batchmean") for k in range(2)])
    by_step.sum().backward()
    torch.testing.assert_close(found.by_step, by_step.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.gradient, drafts.grad, rtol=1e-4, atol=1e-6)


def test_fitting_lowers_the_loss(base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path) -> None:
    untrained = losses_of(base, MedusaHeads((4, 4), 32), sequences)
    heads = run(base, sequences, tmp_path / "c", MEDUSA)
    assert isinstance(heads, MedusaHeads)
    assert (losses_of(base, heads, sequences) < 0.9 * untrained).all()


def test_a_feature_cache_holds_the_last_layers_output_alone(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path
) -> None:
    whole = run(base, sequences, tmp_path / "whole", MEDUSA)
    cached = run(base, sequences, tmp_path / "cached", MEDUSA, feature_cache=tmp_path / "features")
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
    assert FeatureCache(tmp_path / "features", base, (4,), sequences, QUIET).layout.width == 32


def test_held_out_statistics_are_of_what_the_heads_say(base: BaseModel, sequences: list[AnsweredPrompt]) -> None:
    heads = random_transfer((4, 4), drafter="medusa")
    (text,) = predict(base, heads, sequences[:1])
    batch = make_batch(sequences[:1], 2, None, None)
    anchors = batch.anchors[0][batch.weights[0] > 0]
    with torch.no_grad():
        normed = base.model.model(torch.tensor([sequences[0].tokens])).last_hidden_state[0, anchors]
        for k in range(2):
            assert text.tokens[:, k, 0].tolist() == base.model.lm_head(heads(k, normed)).argmax(-1).tolist()


def test_settings_that_cannot_be(base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"drafter must be one of transfer, medusa, not eagle"):
        replace(SETTINGS, drafter="eagle")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"begin as the identity; leave --init ridge out"):
        FitSettings(layers=(4,), drafter="medusa")
    with pytest.raises(InputError, match="no token correction, of rank 4"):
        run(base, sequences, tmp_path / "c", replace(MEDUSA, correction_rank=4))
    with pytest.raises(InputError, match="come after the last layer, 4, not at 2"):
        run(base, sequences, tmp_path / "c", replace(MEDUSA, layers=(2, 4)))
    with pytest.raises(InputError, match="has drafter 'transfer', and 'medusa' is asked for"):
        run(base, sequences, tmp_path / "c", replace(MEDUSA, init="file"), start=random_transfer((4, 4)))


def test_the_command_needs_the_drafters_name_alone(
    tiny_checkpoint: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(tiny_checkpoint), tmp_path / "medusa.safetensors"
    fit = ["fit", model, "--data", str(data_folder), *SHORT, "--out"]
    assert cli.main([*fit, str(out), "--drafter", "medusa"]) == 0
    heads, about = load_transfer_layers(out, load_base_model(model).identity())
    assert isinstance(heads, MedusaHeads)
    assert heads.layers == (4, 4, 4)
    assert {key: about.recipe[key] for key in ("drafter", "init", "correction_rank")} == {
        "drafter": "medusa",
        "init": "identity",
        "correction_rank": 0,
    }
    # What goes on with a file is of its kind.
    further = tmp_path / "further.safetensors"
    assert cli.main([*fit, str(further), "--start", str(out)]) == 0
    assert load_transfer_layers(further)[0].drafter == "medusa"
    for options, message in (
        (["--drafter", "transfer", "--start", str(out)], "has drafter 'medusa', and 'transfer' is asked for"),
        (["--drafter", "medusa", "--correction-rank", "8"], "no token correction, of rank 8"),
        (["--drafter", "medusa", "--init", "ridge"], "leave --init ridge out"),
        (["--drafter", "medusa", "--layers", "2,2"], "come after the last layer, 4, not at 2"),
    ):
        capsys.readouterr()
        assert cli.main([*fit, str(tmp_path / "wrong.safetensors"), *options]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "wrong.safetensors").exists()


def test_checkpoints_of_before_there_were_drafters_are_continued(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path
) -> None:
    run(base, sequences, tmp_path / "c", replace(SETTINGS, steps=2, schedule="constant"))
    with safe_open(tmp_path / "c", framework="pt") as file:
        about = json.loads(file.metadata()["fit"])
    # They did not say it.
    assert about["run"].pop("drafter") is None
    save_file(load_file(tmp_path / "c"), tmp_path / "again", metadata={"fit": json.dumps(about)})
    said: list[str] = []
    run(base, sequences, tmp_path / "again", replace(SETTINGS, steps=3, schedule="constant"), report=said.append)
    assert said[0].startswith("continuing at step 2")
