import json
import struct
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
    other = tmp_path / "other.safetensors"
    save_transfer_layers(other, random_transfer((1,)), TransferFile({**IDENTITY, "architecture": "x" * 10**6}))
    base = load_base_model(str(tiny_checkpoint))
    with pytest.raises(InputError, match=rf"for another model: weights_sha256 is '0+' there \(tiny\).*{base.name}"):
        load_transfer_layers(path, base.identity())
    with pytest.raises(InputError, match=r"architecture is 'xxx.*xxx' there") as raised:
        load_transfer_layers(other, base.identity())
    assert len(str(raised.value)) < 1000
    with pytest.raises(InputError, match="hidden_size is 32 there"):
        load_transfer_layers(path, {**base.identity(), "hidden_size": 64})


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no transfer layers at"):
        load_transfer_layers(tmp_path / "none.safetensors")


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_transfer_layers(path, random_transfer((1,)), TransferFile(IDENTITY))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a valid safetensors file of transfer layers"):
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
    path = write(tmp_path / "t.safetensors", {"x": torch.zeros(2)}, version=4)
    with pytest.raises(InputError, match="of version 4; this release reads versions 2 and 3: update"):
        load_transfer_layers(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": None}, r"`\$\.recipe`, which is None"),
        ({"base_model": {}}, r"missing required field `(hidden_size|num_layers)` - at `\$\.base_model`"),
        (
            {"base_model": {**IDENTITY, "hidden_size": 10**9}},
            r"<= 65536 - at `\$\.base_model\.hidden_size`, which is 10+\)",
        ),
        ({"base_model": {**IDENTITY, "vocab_size": "many"}}, r"`\$\.base_model\.vocab_size`, which is 'many'"),
        ({"layers": ["x"]}, r"`\$\.layers\[0\]`, which is 'x'"),
        ({"layers": [True]}, r"`\$\.layers\[0\]`, which is True"),
        ({"layers": []}, r"length >= 1 - at `\$\.layers`"),
        ({"layers": [1] * 65}, r"length <= 64 - at `\$\.layers`"),
        ({"correction_rank": -1}, r"`int` >= 0 - at `\$\.correction_rank`, which is -1"),
        ({"correction_rank": 10**9}, r"`int` <= 65536 - at `\$\.correction_rank`"),
        ({"version": "2"}, r"`\$\.version`, which is '2'"),
        # What decoding reads of them is read here: an export would find out too late.
        (
            {"acceptance": {"calibration": 3}},
            "statistics of drafts cannot be: Expected `array.*; fetch or train the file",
        ),
        ({"acceptance": {"foresight": [{"temperature": -1, "steps": []}]}}, "foresight of drafts cannot be: .* > 0"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_transfer_layers(write(tmp_path / "t.safetensors", {"x": torch.zeros(2)}, **changes))


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, '{"version": 2, "layers": ' + "[" * 100_000])
def test_metadata_that_is_something_else(tmp_path: Path, text: str) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "t.safetensors", metadata={METADATA_KEY: text})
    with pytest.raises(InputError, match=r"metadata hidden_transfer is not a valid description of transfer layers"):
        load_transfer_layers(tmp_path / "t.safetensors")


def test_sizes_that_are_stated_only_take_no_memory(tmp_path: Path) -> None:
    stated = {**IDENTITY, "hidden_size": 1 << 16}
    path = write(tmp_path / "t.safetensors", {"x": torch.zeros(2)}, base_model=stated, layers=[1] * 64)
    # 1 TiB in float32.
    with pytest.raises(InputError, match=r"step1\.weight is missing; it must be of shape \[65536, 65536\]"):
        load_transfer_layers(path)


def test_measured_numbers_may_be_what_only_python_writes(tmp_path: Path) -> None:
    tensors = {"step1.weight": torch.zeros(32, 32), "step1.bias": torch.zeros(32)}
    _, about = load_transfer_layers(write(tmp_path / "t.safetensors", tensors, acceptance={"kl": [float("inf")]}))
    assert about.acceptance == {"kl": [float("inf")]}


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", ""),
        (b"\x05", ""),
        (header(b"{}", 1 << 60), r"its header is to have 1152921504606846976 bytes, and at most 16777216 can be"),
        (header(b"{}", 1000), ""),
        (header(b"[" * 100_000), ""),
        (header(b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}'), ""),
        (header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}') + bytes(4), ""),
        (header(b'{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4), ""),
    ],
)
def test_headers_of_nobody(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"not a valid safetensors file of transfer layers \({cause}"):
        load_transfer_layers(path)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint64]
)
def test_weights_of_any_type_are_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"step1.weight": torch.ones(32, 32).to(dtype), "step1.bias": torch.ones(32).to(dtype)}
    transfer, _ = load_transfer_layers(write(tmp_path / "t.safetensors", tensors))
    torch.testing.assert_close(transfer.linears[0].weight.data, torch.ones(32, 32))


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


def test_draft_tokens_come_back_and_files_without_them_mean_all_tokens(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    transfer = random_transfer((1,), draft_tokens=[0, 2, 7])
    save_transfer_layers(path, transfer, TransferFile(IDENTITY))
    found, _ = load_transfer_layers(path)
    assert found.draft_tokens is not None
    assert (found.draft_tokens.tolist(), found.draft_size) == ([0, 2, 7], 3)
    assert found.digest() == transfer.digest() != random_transfer((1,)).digest()
    # They are where the weights are, and nothing of what is trained.
    assert set(found.state_dict()) == set(random_transfer((1,)).state_dict())
    save_transfer_layers(path, random_transfer((1,)), TransferFile(IDENTITY))
    without, _ = load_transfer_layers(path)
    assert (without.draft_tokens, without.draft_size) == (None, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_draft_tokens_of_either_type(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {**MAP, "draft_tokens": torch.tensor([1, 5], dtype=dtype)}
    found, _ = load_transfer_layers(write(tmp_path / "t.safetensors", tensors))
    assert found.draft_tokens is not None
    assert found.draft_tokens.dtype == torch.int64


MAP = {"step1.weight": torch.zeros(32, 32), "step1.bias": torch.zeros(32)}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(0, dtype=torch.int32), r"of shape \[0\]; it must have one dimension, of 1 to 264 tokens"),
        (torch.arange(265), r"of shape \[265\]; it must have one dimension"),
        (torch.zeros(2, 2, dtype=torch.int32), r"of shape \[2, 2\]"),
        (torch.tensor([0.0, 1.0]), r"of type torch\.float32, not int32 or int64"),
        (torch.tensor([-1, 1]), "it has token -1, below 0"),
        (torch.tensor([0, 264]), "it has token 264, and the vocabulary has 264 tokens"),
        (torch.tensor([0, 1 << 40]), "it has token 1099511627776, and the vocabulary has 264 tokens"),
        (torch.tensor([3, 2]), "it has token 2 after 3: they must be in ascending order"),
        (torch.tensor([2, 2]), "it has token 2 after 2"),
    ],
)
def test_draft_tokens_that_cannot_be(tmp_path: Path, tokens: torch.Tensor, message: str) -> None:
    path = write(tmp_path / "t.safetensors", {**MAP, "draft_tokens": tokens})
    with pytest.raises(InputError, match=f"{message}.*choose them again with ht-train draft-head"):
        load_transfer_layers(path)


def test_draft_tokens_of_a_vocabulary_that_is_not_stated(tmp_path: Path) -> None:
    stated = {name: value for name, value in IDENTITY.items() if name != "vocab_size"}
    tensors = {**MAP, "draft_tokens": torch.tensor([1, 5])}
    with pytest.raises(InputError, match="does not say of which vocab_size"):
        load_transfer_layers(write(tmp_path / "t.safetensors", tensors, base_model=stated))
