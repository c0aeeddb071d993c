import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.prompts import encode_chat
from ht_export.training import generate
from ht_export.training.data import AnsweredPrompt, fingerprint, read_data
from ht_export.training.generate import DataSettings, answer, generate_data
from runtime.errors import InputError
from tests.conftest import save_checkpoint, tiny_llama
from tests.ht_export.training.conftest import QUIET, SETTINGS


def test_answers_are_the_base_models_own_whatever_their_batch(base: BaseModel) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20]]
    together = answer(base, prompts, DataSettings(max_new_tokens=12))
    for prompt, tokens in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        output = base.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert tokens == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_continues_after_a_kill_with_the_same_text(
    base: BaseModel, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    settings = replace(SETTINGS, temperature=temperature)
    generate_data(base, prompts_file, tmp_path / "whole", settings, QUIET)
    calls = 0

    def dies_at_the_second_batch(*arguments: Any) -> list[list[int]]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(generate, "answer", dies_at_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        generate_data(base, prompts_file, tmp_path / "killed", settings, QUIET)
    with pytest.raises(InputError, match="is not finished; run ht-train data again"):
        read_data(tmp_path / "killed", base, 4)
    generate_data(base, prompts_file, tmp_path / "killed", settings, QUIET)
    assert calls == 4
    assert read_data(tmp_path / "killed", base, 4) == read_data(tmp_path / "whole", base, 4)


def test_sampled_text_depends_on_the_seed_and_differs_from_greedy_text(base: BaseModel) -> None:
    prompts = [[5, 6, 7], [8, 9, 10]]
    sampled = DataSettings(max_new_tokens=16, temperature=1.5)
    greedy = answer(base, prompts, DataSettings(max_new_tokens=16))
    assert answer(base, prompts, sampled, seed=3) == answer(base, prompts, sampled, seed=3)
    assert answer(base, prompts, sampled, seed=3) != answer(base, prompts, sampled, seed=4)
    assert answer(base, prompts, sampled, seed=3) != greedy
    assert answer(base, prompts, replace(sampled, top_k=1), seed=3) == greedy


def test_a_later_turn_follows_the_base_models_answer_to_the_one_before(base: BaseModel, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": "a", "turns": ["one", "two"]}, {"id": "b", "prompt": "alone"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate_data(base, prompts, tmp_path / "data", replace(SETTINGS, max_turns=3), QUIET)
    found = {sequence.id: sequence for sequence in read_data(tmp_path / "data", base, 1)}
    assert sorted(found) == ["a/1", "a/2", "b/1"]
    said = base.tokenizer.decode(found["a/1"].answer, skip_special_tokens=True)
    assert found["a/2"].prompt == encode_chat(base.tokenizer, ["one", "two"], [said])
    assert base.tokenizer.decode(found["a/2"].prompt).startswith(
        f"<s><|user|>one</s><|assistant|>{said}</s><|user|>two"
    )


def test_duplicates_and_held_out_prompts_are_left_out(base: BaseModel, tmp_path: Path) -> None:
    prompts, held_out = tmp_path / "prompts.jsonl", tmp_path / "held-out.jsonl"
    texts = ["Why is  the sky blue?", "why is the sky blue? ", "Why not?", "Held out"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    held_out.write_text(json.dumps({"turns": ["held OUT", "and on"]}) + "\n")
    generate_data(base, prompts, tmp_path / "data", SETTINGS, QUIET, held_out)
    assert sorted(sequence.id for sequence in read_data(tmp_path / "data", base, 1)) == ["1/1", "3/1"]
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert (manifest["sequences"], manifest["duplicates_or_excluded"], manifest["too_long"]) == (2, 2, 0)
    assert manifest["base_model"] == base.identity()
    assert manifest["settings"]["seed"] == 0
    with pytest.raises(InputError, match="every prompt is in"):
        generate_data(base, held_out, tmp_path / "none", SETTINGS, QUIET, held_out)


def test_a_folder_of_other_settings_is_not_mixed(base: BaseModel, prompts_file: Path, data_folder: Path) -> None:
    with pytest.raises(InputError, match="made with another max_new_tokens"):
        generate_data(base, prompts_file, data_folder, DataSettings(max_new_tokens=5), QUIET)


def test_settings_may_change_until_there_is_an_answer(base: BaseModel, prompts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="raise --max-prompt-tokens"):
        generate_data(base, prompts_file, tmp_path, replace(SETTINGS, max_prompt_tokens=3), QUIET)
    generate_data(base, prompts_file, tmp_path, SETTINGS, QUIET)
    assert read_data(tmp_path, base, 4)


def test_shards_of_unknown_origin_are_not_taken(base: BaseModel, prompts_file: Path, tmp_path: Path) -> None:
    (tmp_path / "shard-0-00000.jsonl").write_text("")
    with pytest.raises(InputError, match=r"holds shards without a manifest\.json"):
        generate_data(base, prompts_file, tmp_path, SETTINGS, QUIET)


def test_a_shard_cut_short_is_noticed(base: BaseModel, prompts_file: Path, data_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data_folder, tmp_path / "copy"))
    shard = folder / "shard-0-00001.jsonl"
    shard.write_text(shard.read_text().split("\n", 1)[0] + "\n")
    with pytest.raises(InputError, match="holds 7 of 10 answers; a shard was cut short"):
        read_data(folder, base, 4)
    with pytest.raises(InputError, match="does not hold the prompts that it should; delete it"):
        generate_data(base, prompts_file, folder, SETTINGS, QUIET)


def test_the_models_own_generation_settings_do_not_change_the_text(base: BaseModel) -> None:
    prompts = [[5, 6, 7], [8, 9, 10]]
    settings = DataSettings(max_new_tokens=24)
    before = answer(base, prompts, settings)
    base.model.generation_config.repetition_penalty = 5.0
    try:
        assert answer(base, prompts, settings) == before
    finally:
        base.model.generation_config.repetition_penalty = None


def test_data_of_other_weights_is_refused(data_folder: Path, tmp_path: Path) -> None:
    other = load_base_model(str(save_checkpoint(tmp_path, tiny_llama(seed=1))))
    with pytest.raises(InputError, match="was made with other weights"):
        read_data(data_folder, other, 4)


def test_prompts_that_are_all_too_long(base: BaseModel, prompts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no prompt has at most 3 tokens \(the shortest has \d+\); raise"):
        generate_data(base, prompts_file, tmp_path, DataSettings(max_prompt_tokens=3), QUIET)


MADE = '{"version": 2, "base_model": {"name": "a", "weights_sha256": "b"}, "shards": '
ANSWERED = '{"id": "1", "task": "", "prompt": [1], "answer": '


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "{", r"manifest\.json is not a valid manifest of data .*make the data again"),
        ("manifest.json", "{}", r"manifest\.json is not a valid .*missing required field `version`"),
        ("manifest.json", "[]", r"manifest\.json is not a valid .*Expected `object`"),
        ("manifest.json", "[" * 100_000, r"manifest\.json is not a valid .*nested too deeply"),
        ("manifest.json", MADE + "3}", r"`\$\.shards`, which is 3"),
        (
            "manifest.json",
            MADE + '["../shard-0-00001.jsonl"], "sequences": 1}',
            r"\$\.shards\[0\]`, which is '\.\./shard",
        ),
        ("manifest.json", MADE + '["/etc/passwd"], "sequences": 1}', r"\$\.shards\[0\]`, which is '/etc/passwd'"),
        ("manifest.json", MADE + '["shard-0-00001.jsonl"]}', "shards without the number of their sequences"),
        ("manifest.json", MADE + '["shard-0-0.jsonl", "shard-0-0.jsonl"], "sequences": 1}', "names a shard twice"),
        ("manifest.json", MADE + '[], "sequences": "many"}', r"`\$\.sequences`, which is 'many'"),
        ("manifest.json", MADE.replace('"b"', "5") + "null}", r"`\$\.base_model\.weights_sha256`, which is 5"),
        ("shard-0-00001.jsonl", '{"id": 1}', r"shard-0-00001\.jsonl, line 1 is not a valid .*`\$\.id`, which is 1"),
        ("shard-0-00001.jsonl", '{"id": ', r"shard-0-00001\.jsonl, line 1 is not a valid answered prompt .*truncated"),
        ("shard-0-00001.jsonl", ANSWERED + '["x"]}', r"`int`, got `str` - at `\$\.answer\[0\]`, which is 'x'"),
        ("shard-0-00001.jsonl", ANSWERED + "[]}", r"length >= 1 - at `\$\.answer`"),
        ("shard-0-00001.jsonl", ANSWERED + "[-1]}", r"`int` >= 0 - at `\$\.answer\[0\]`, which is -1"),
        ("shard-0-00001.jsonl", ANSWERED + "[4294967296]}", r"<= 2147483647 - at `\$\.answer\[0\]`"),
        ("shard-0-00001.jsonl", ANSWERED + "[" * 100_000, "line 1 is not a valid .*"),
        ("shard-0-00001.jsonl", None, r"lacks 1 of 3 shards \(first: shard-0-00001"),
    ],
)
def test_damaged_data_is_named(
    base: BaseModel, data_folder: Path, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    folder = Path(shutil.copytree(data_folder, tmp_path / "copy"))
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_data(folder, base, 4)


def test_a_finished_folder_of_nothing(base: BaseModel, tmp_path: Path) -> None:
    made = MADE.replace('"b"', f'"{base.weights_sha256}"')
    (tmp_path / "manifest.json").write_text(made + '[], "sequences": 0}')
    with pytest.raises(InputError, match="holds no answer of at least 4 tokens"):
        read_data(tmp_path, base, 4)


def test_data_of_a_newer_version_is_refused(base: BaseModel, data_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data_folder, tmp_path / "copy"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 3}))
    with pytest.raises(InputError, match="is of version 3; this release reads version 2"):
        read_data(folder, base, 4)


def test_answers_too_short_to_learn_from(base: BaseModel, data_folder: Path) -> None:
    with pytest.raises(InputError, match="holds no answer of at least 99 tokens"):
        read_data(data_folder, base, 99)


def test_the_fingerprint_tells_texts_apart() -> None:
    one = AnsweredPrompt("0", "", [1, 2], [3])
    assert fingerprint([one]) == fingerprint([replace(one, id="x")])
    assert fingerprint([one]) != fingerprint([AnsweredPrompt("0", "", [1], [2, 3])])
    assert fingerprint([one]) != fingerprint([one, one])
