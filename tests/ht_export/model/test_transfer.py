import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ht_export.model.checkpoint import load_base_model
from ht_export.model.transfer import (
    METADATA_KEY,
    TransferFile,
    TransferLayers,
    load_transfer_layers,
    save_transfer_layers,
)
from runtime.errors import InputError
from tests.conftest import random_transfer

IDENTITY: dict[str, Any] = {
    "name": "tiny",
    "architecture": "llama",
    "hidden_size": 32,
    "num_layers": 4,
    "vocab_size": 264,
    "weights_sha256": "0" * 64,
}


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    transfer = random_transfer((3, 1, 4), correction_rank=5)
    about = TransferFile(IDENTITY, {"steps": 7}, {"top": {"1": [0.5]}})
    save_transfer_layers(path, transfer, about)
    loaded, found = load_transfer_layers(path, IDENTITY)
    assert loaded.layers == (3, 1, 4)
    assert found == about
    for name, tensor in transfer.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)


def test_rows_join_from_the_earliest_layer_on_and_by_step_within_one() -> None:
    transfer = TransferLayers((3, 1, 3), 8)
    assert transfer.join_order == (1, 0, 2)
    assert [transfer.joining(layer) for layer in range(5)] == [[], [1], [], [0, 2], []]


def test_untrained_layers_are_the_identity() -> None:
    hidden = torch.randn(2, 3, 8)
    torch.testing.assert_close(TransferLayers((1, 2), 8)(1, hidden), hidden)


def test_another_models_layers_are_refused_with_both_names(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_transfer_layers(path, random_transfer((1,)), TransferFile(IDENTITY))
    base = load_base_model(str(tiny_checkpoint))
    with pytest.raises(InputError, match=rf"for another model: weights_sha256 is '0+' there \(tiny\).*{base.name}"):
        load_transfer_layers(path, base.identity())
    with pytest.raises(InputError, match="hidden_size is 32 there"):
        load_transfer_layers(path, {**base.identity(), "hidden_size": 64})


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no transfer layers at"):
        load_transfer_layers(tmp_path / "none.safetensors")


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_transfer_layers(path, random_transfer((1,)), TransferFile(IDENTITY))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_transfer_layers(path)


def write(path: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    known = {"version": 2, "layers": [1], "correction_rank": 0, "base_model": IDENTITY, "recipe": {}, "acceptance": {}}
    metadata = {**known, **changes}
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(metadata)})
    return path


def test_other_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="holds no transfer layers"):
        load_transfer_layers(path)


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.safetensors", {"x": torch.zeros(2)}, version=3)
    with pytest.raises(InputError, match="format version 3; this release reads version 2"):
        load_transfer_layers(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": None}, "lacks or misstates 'recipe'"),
        ({"base_model": {}}, "must be whole numbers"),
        ({"layers": ["x"]}, "must be whole numbers"),
        ({"correction_rank": -1}, "must be whole numbers from 0 to"),
        ({"correction_rank": 10**9}, "must be whole numbers from 0 to"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_transfer_layers(write(tmp_path / "t.safetensors", {"x": torch.zeros(2)}, **changes))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"step1.weight": torch.zeros(32, 32)}, r"step1\.bias is missing"),
        ({"step1.weight": torch.zeros(16, 32), "step1.bias": torch.zeros(32)}, r"of shape \[16, 32\]; it must be"),
        ({"step1.weight": torch.full((32, 32), torch.nan), "step1.bias": torch.zeros(32)}, "not finite"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_transfer_layers(write(tmp_path / "t.safetensors", tensors))


def test_a_layer_out_of_range(tmp_path: Path) -> None:
    tensors = {"step1.weight": torch.zeros(32, 32), "step1.bias": torch.zeros(32)}
    with pytest.raises(InputError, match="transfer layer 9 does not exist in a model of 4 layers"):
        load_transfer_layers(write(tmp_path / "t.safetensors", tensors, layers=[9]))
