import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.progress import stage_display
from ht_export.prompts import encode_chat
from ht_export.training import generate
from ht_export.training.data import AnsweredPrompt, DataFolder, fingerprint, read_data
from ht_export.training.engine import data_engine
from ht_export.training.generate import DataSettings, Part, encode, generate_data
from ht_export.training.merging import merge
from runtime import Generator
from runtime.errors import InputError
from tests.conftest import save_checkpoint, tiny_llama
from tests.ht_export.training.conftest import QUIET, SETTINGS


@pytest.fixture
def restarted(tiny_engine: Path) -> Callable[[], AbstractContextManager[Generator]]:
    """Begins a run anew, as a process of its own would."""
    return lambda: Generator(tiny_engine, threads=1, adapt=False, max_batch=3)


def own_answer(base: BaseModel, prompt: list[int], length: int) -> list[int]:
    ids = torch.tensor([prompt])
    stops = base.stop_tokens()
    output = base.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    found: list[int] = output[0, len(prompt) :].tolist()
    return found


def test_answers_are_the_base_models_own(base: BaseModel, data_folder: Path) -> None:
    sequences = read_data(data_folder, base, 1)
    assert len(sequences) == 10
    for sequence in sequences:
        assert sequence.answer == own_answer(base, sequence.prompt, SETTINGS.max_new_tokens)


def test_prompts_are_encoded_as_for_training(base: BaseModel, answering: Generator) -> None:
    turns = ["one", "two </s>", "three"]
    assert encode(answering, turns, ["1", "2"]) == encode_chat(base.tokenizer, turns, ["1", "2"])


class KilledError(Exception):
    """As a signal would end it."""


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_continues_after_a_kill_with_the_same_text(
    base: BaseModel,
    answering: Generator,
    restarted: Callable[[], AbstractContextManager[Generator]],
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
) -> None:
    settings = replace(SETTINGS, temperature=temperature)
    generate_data(answering, prompts_file, tmp_path / "whole", settings, QUIET)
    write = DataFolder.write_shard
    written: list[int] = []

    def dies_at_the_second_shard(folder: DataFolder, turn: int, number: int, found: Sequence[AnsweredPrompt]) -> None:
        if len(written) == 1:
            raise KilledError
        written.append(number)
        write(folder, turn, number, found)

    with monkeypatch.context() as patched:
        patched.setattr(DataFolder, "write_shard", dies_at_the_second_shard)
        with pytest.raises(KilledError), restarted() as generator:
            generate_data(generator, prompts_file, tmp_path / "killed", settings, QUIET)
    with pytest.raises(InputError, match="is not finished; run ht-train data again"):
        read_data(tmp_path / "killed", base, 4)
    (kept,) = (tmp_path / "killed").glob("shard-*")
    times = kept.stat().st_mtime_ns
    with restarted() as generator:
        generate_data(generator, prompts_file, tmp_path / "killed", settings, QUIET)
    assert kept.stat().st_mtime_ns == times
    assert read_data(tmp_path / "killed", base, 4) == read_data(tmp_path / "whole", base, 4)


def test_sampled_text_depends_on_the_seed_and_differs_from_greedy_text(
    base: BaseModel, answering: Generator, prompts_file: Path, data_folder: Path, tmp_path: Path
) -> None:
    def text(name: str, **settings: Any) -> list[AnsweredPrompt]:
        asked = replace(SETTINGS, **settings)
        generate_data(answering, prompts_file, tmp_path / name, asked, QUIET)
        return sorted(read_data(tmp_path / name, base, 1), key=lambda one: one.id)

    greedy = sorted(read_data(data_folder, base, 1), key=lambda one: one.id)
    three = text("three", temperature=1.5, seed=3)
    assert three == text("in other shards", temperature=1.5, seed=3, shard_size=3)
    assert fingerprint(three) != fingerprint(text("four", temperature=1.5, seed=4))
    assert fingerprint(three) != fingerprint(greedy)
    assert text("one", temperature=1.5, top_k=1) == greedy


def test_parts_are_the_whole(
    base: BaseModel, answering: Generator, prompts_file: Path, data_folder: Path, tmp_path: Path
) -> None:
    parts = [tmp_path / name for name in ("a", "b", "c")]
    for number, folder in enumerate(parts, 1):
        generate_data(answering, prompts_file, folder, replace(SETTINGS, part=Part(number, 3)), QUIET)
    assert merge(parts[::-1], tmp_path / "all") == 10

    def by_id(folder: Path) -> list[AnsweredPrompt]:
        return sorted(read_data(folder, base, 1), key=lambda one: one.id)

    assert by_id(tmp_path / "all") == by_id(data_folder)
    made = json.loads((tmp_path / "all" / "manifest.json").read_text())
    assert made["settings"] == json.loads((data_folder / "manifest.json").read_text())["settings"]
    with pytest.raises(InputError, match="is a data folder already"):
        merge(parts, tmp_path / "all")
    with pytest.raises(InputError, match="these are the parts 1/3, 2/3, and not all of one whole"):
        merge(parts[:2], tmp_path / "two")
    with pytest.raises(InputError, match="are both part 1/3; give each part once"):
        merge([parts[0], parts[0], parts[2]], tmp_path / "two")
    with pytest.raises(InputError, match="not all of one whole"):
        merge([parts[0], data_folder], tmp_path / "two")
    with pytest.raises(InputError, match="is not a data folder"):
        merge([parts[0], tmp_path / "nowhere"], tmp_path / "two")
    other = replace(SETTINGS, part=Part(2, 2), max_new_tokens=5)
    generate_data(answering, prompts_file, tmp_path / "short", other, QUIET)
    with pytest.raises(InputError, match="was made with another max_new_tokens than"):
        merge([parts[0], tmp_path / "short"], tmp_path / "two")
    cut = next(parts[1].glob("shard-*"))
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="a shard was cut short"):
        merge(parts, tmp_path / "two")
    cut.unlink()
    with pytest.raises(InputError, match="is not finished; run ht-train data again"):
        merge(parts, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_an_engine_that_is_there_has_the_transfer_layers_asked_for(
    tiny_checkpoint: Path, tiny_transfer: Path, tiny_engine: Path, draft_head_transfer: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_engine.parent, tmp_path / "engine-fp32")
    with stage_display() as stage:
        engine = data_engine(str(tiny_checkpoint), tmp_path, None, tiny_transfer, stage)
        assert engine == tmp_path / "engine-fp32" / "engine.onnx"
        assert data_engine(str(tiny_checkpoint), tmp_path, "fp32", None, stage) == engine
        with pytest.raises(InputError, match="has other transfer layers than"):
            data_engine(str(tiny_checkpoint), tmp_path, None, draft_head_transfer, stage)


def test_a_part_without_prompts(answering: Generator, prompts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="part 11/11 has no prompt; make fewer parts"):
        generate_data(answering, prompts_file, tmp_path, replace(SETTINGS, part=Part(11, 11)), QUIET)
    for number, of in ((0, 1), (2, 1), (1, 1 << 17)):
        with pytest.raises(InputError, match="part must be I/N with I from 1 to N"):
            Part(number, of)


def test_a_later_turn_follows_the_base_models_answer_to_the_one_before(
    base: BaseModel, answering: Generator, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": "a", "turns": ["one", "two"]}, {"id": "b", "prompt": "alone"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate_data(answering, prompts, tmp_path / "data", replace(SETTINGS, max_turns=3), QUIET)
    found = {sequence.id: sequence for sequence in read_data(tmp_path / "data", base, 1)}
    assert sorted(found) == ["a/1", "a/2", "b/1"]
    said = base.tokenizer.decode(found["a/1"].answer, skip_special_tokens=True)
    assert found["a/2"].prompt == encode_chat(base.tokenizer, ["one", "two"], [said])
    assert base.tokenizer.decode(found["a/2"].prompt).startswith(
        f"<s><|user|>one</s><|assistant|>{said}</s><|user|>two"
    )


def test_duplicates_and_held_out_prompts_are_left_out(base: BaseModel, answering: Generator, tmp_path: Path) -> None:
    prompts, held_out = tmp_path / "prompts.jsonl", tmp_path / "held-out.jsonl"
    texts = ["Why is  the sky blue?", "why is the sky blue? ", "Why not?", "Held out"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    held_out.write_text(json.dumps({"turns": ["held OUT", "and on"]}) + "\n")
    generate_data(answering, prompts, tmp_path / "data", SETTINGS, QUIET, held_out)
    assert sorted(sequence.id for sequence in read_data(tmp_path / "data", base, 1)) == ["1/1", "3/1"]
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert (manifest["sequences"], manifest["duplicates_or_excluded"], manifest["too_long"]) == (2, 2, 0)
    assert manifest["base_model"] == base.identity()
    assert manifest["settings"]["seed"] == 0
    with pytest.raises(InputError, match="every prompt is in"):
        generate_data(answering, held_out, tmp_path / "none", SETTINGS, QUIET, held_out)


def test_prompts_that_are_a_held_out_one_to_the_model_alone_are_left_out(
    base: BaseModel, answering: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_without_marks(generator: Generator, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
        """Stands for a tokenizer that does not know "!"."""
        return encode(generator, [turn.replace("!", "") for turn in turns], answers)

    monkeypatch.setattr(generate, "encode", encode_without_marks)
    prompts, held_out = tmp_path / "prompts.jsonl", tmp_path / "held-out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one!", "other")))
    held_out.write_text(json.dumps({"prompt": "one"}) + "\n")
    generate_data(answering, prompts, tmp_path / "data", SETTINGS, QUIET, held_out)
    assert sorted(sequence.id for sequence in read_data(tmp_path / "data", base, 1)) == ["2/1"]
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["duplicates_or_excluded"] == 1
    prompts.write_text(json.dumps({"prompt": "one!"}) + "\n")
    with pytest.raises(InputError, match="to this model every prompt is one in"):
        generate_data(answering, prompts, tmp_path / "none", SETTINGS, QUIET, held_out)


def test_a_folder_of_other_settings_is_not_mixed(answering: Generator, prompts_file: Path, data_folder: Path) -> None:
    with pytest.raises(InputError, match="made with another max_new_tokens"):
        generate_data(answering, prompts_file, data_folder, DataSettings(max_new_tokens=5), QUIET)


def test_settings_may_change_until_there_is_an_answer(
    base: BaseModel, answering: Generator, prompts_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="raise --max-prompt-tokens"):
        generate_data(answering, prompts_file, tmp_path, replace(SETTINGS, max_prompt_tokens=3), QUIET)
    generate_data(answering, prompts_file, tmp_path, SETTINGS, QUIET)
    assert read_data(tmp_path, base, 4)


def test_shards_of_unknown_origin_are_not_taken(answering: Generator, prompts_file: Path, tmp_path: Path) -> None:
    (tmp_path / "shard-0-00000.jsonl").write_text("")
    with pytest.raises(InputError, match=r"holds shards without a manifest\.json"):
        generate_data(answering, prompts_file, tmp_path, SETTINGS, QUIET)


def test_a_shard_cut_short_is_noticed(
    base: BaseModel, answering: Generator, prompts_file: Path, data_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(data_folder, tmp_path / "copy"))
    shard = folder / "shard-0-00001.jsonl"
    shard.write_text(shard.read_text().split("\n", 1)[0] + "\n")
    with pytest.raises(InputError, match="holds 7 of 10 answers; a shard was cut short"):
        read_data(folder, base, 4)
    with pytest.raises(InputError, match="does not hold the prompts that it should; delete it"):
        generate_data(answering, prompts_file, folder, SETTINGS, QUIET)


def test_data_of_other_weights_is_refused(data_folder: Path, tmp_path: Path) -> None:
    other = load_base_model(str(save_checkpoint(tmp_path, tiny_llama(seed=1))))
    with pytest.raises(InputError, match="was made with other weights"):
        read_data(data_folder, other, 4)


def test_prompts_that_are_all_too_long(answering: Generator, prompts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no prompt has at most 3 tokens \(the shortest has \d+\); raise"):
        generate_data(answering, prompts_file, tmp_path, DataSettings(max_prompt_tokens=3), QUIET)


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
