import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from ht_export.attention import use_attention_rows
from ht_export.checkpoint import BaseModel, load_base_model
from ht_export.families import decoder_parts
from ht_export.training import cli, data
from ht_export.training.batches import BatchSampler, make_batch
from ht_export.training.data import DataSettings, Sequence, generate_data, greedy_answers, read_data, read_prompts
from ht_export.training.drafts import draft_hidden, run_context
from ht_export.training.evaluate import evaluate
from ht_export.training.fit import FitSettings, draft_losses, fit
from ht_export.transfer import TransferLayers, load_transfer_layers
from runtime.errors import InputError
from tests.conftest import random_transfer, save_checkpoint, tiny_llama

SETTINGS = DataSettings(max_new_tokens=24, batch_size=4)


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> BaseModel:
    loaded = load_base_model(str(tiny_checkpoint))
    use_attention_rows(loaded.model)
    return loaded


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"id": i, "task": "ab"[i % 2], "prompt": f"Prompt number {i * 37 % 11}{'.' * i}"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory, base: BaseModel, prompts_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate_data(base, prompts_file, folder, SETTINGS, Progress(disable=True))
    return folder


def test_answers_are_the_base_models_own_whatever_their_batch(base: BaseModel) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20]]
    together = greedy_answers(base, prompts, 12)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        output = base.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert answer == output[0, len(prompt) :].tolist()


def test_generation_continues_after_a_kill(
    base: BaseModel, prompts_file: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def dies_at_the_second_batch(*arguments: Any) -> list[list[int]]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return greedy_answers(*arguments)

    monkeypatch.setattr(data, "greedy_answers", dies_at_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        generate_data(base, prompts_file, tmp_path, SETTINGS, Progress(disable=True))
    with pytest.raises(InputError, match="has 1 of 3 shards; finish it"):
        read_data(tmp_path, base, 4)
    generate_data(base, prompts_file, tmp_path, SETTINGS, Progress(disable=True))
    assert calls == 4
    assert read_data(tmp_path, base, 4) == read_data(data_folder, base, 4)


def test_a_folder_of_other_settings_is_not_mixed(base: BaseModel, prompts_file: Path, data_folder: Path) -> None:
    with pytest.raises(InputError, match="made with another settings"):
        generate_data(base, prompts_file, data_folder, DataSettings(max_new_tokens=5), Progress(disable=True))


def test_data_of_other_weights_is_refused(data_folder: Path, tmp_path: Path) -> None:
    other = load_base_model(str(save_checkpoint(tmp_path, tiny_llama(seed=1))))
    with pytest.raises(InputError, match="was made with other weights"):
        read_data(data_folder, other, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "line 2: not valid JSON"),
        ('{"prompt": "a"}\n\n{"text": "b"}\n', "line 3: needs 'prompt'"),
        ('["a"]\n', "line 1: needs 'prompt'"),
        ('{"turns": "abc"}\n', "line 1: needs 'prompt'"),
        ('{"turns": {"a": 1}}\n', "line 1: needs 'prompt'"),
        ('{"prompt": "a"}\n{"prompt": "\udcff"}\n', "line 2: not valid JSON"),
        ("\n", "holds no prompts"),
    ],
)
def test_prompts_that_cannot_be_read_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=message):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "{", r"manifest\.json is damaged"),
        ("manifest.json", "{}", r"manifest\.json is damaged"),
        ("shard-00001.jsonl", '{"id": 1}', r"shard-00001\.jsonl is damaged"),
        ("shard-00001.jsonl", '{"id": ', r"shard-00001\.jsonl is damaged"),
    ],
)
def test_damaged_data_is_named(
    base: BaseModel, data_folder: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    folder = Path(shutil.copytree(data_folder, tmp_path / "copy"))
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_data(folder, base, 4)


def test_data_of_a_newer_version_is_refused(base: BaseModel, data_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data_folder, tmp_path / "copy"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(InputError, match="is of version 2; this release reads version 1"):
        read_data(folder, base, 4)


def test_prompts_may_hold_any_line_separator(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"turns": ["one\u2028two\x85three", "next"]}, ensure_ascii=False) + "\n")
    assert [prompt["text"] for prompt in read_prompts(path)] == ["one\u2028two\x85three"]


def test_prompts_that_are_all_too_long(base: BaseModel, prompts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every prompt is longer than 3 tokens; raise --max-prompt-tokens"):
        generate_data(base, prompts_file, tmp_path, DataSettings(max_prompt_tokens=3), Progress(disable=True))


def test_every_anchors_drafts_have_labels_in_the_answer() -> None:
    sequences = [Sequence("0", "", [5, 6, 7], [8, 9, 10, 11, 12]), Sequence("1", "", [5], [6, 7, 8, 9])]
    batch = make_batch(sequences, 2, None, None)
    assert batch.anchors.tolist() == [[2, 3, 4], [0, 1, 0]]
    assert batch.weights.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 9, 0, 0, 0]]


def test_a_pass_over_the_data_takes_each_text_once_and_batches_depend_on_the_step_alone() -> None:
    sequences = [Sequence(str(i), "", [i + 10] * (1 + i % 5), [5] * (8 + i)) for i in range(20)]
    sampler = BatchSampler(sequences, 4, 3, 2, seed=0)
    first_tokens = [token for step in range(5) for token in sampler.batch(step).input_ids[:, 0].tolist()]
    assert sorted(first_tokens) == list(range(10, 30))
    again = BatchSampler(sequences, 4, 3, 2, seed=0).batch(7)
    assert torch.equal(again.anchors, sampler.batch(7).anchors)
    assert not torch.equal(sampler.batch(0).input_ids[:, 0], sampler.batch(5).input_ids[:, 0])


def test_the_loss_is_the_kl_of_each_step(base: BaseModel, data_folder: Path) -> None:
    sequence = read_data(data_folder, base, 4)[0]
    transfer = random_transfer((2, 4))
    batch = make_batch([sequence], 2, None, None)
    losses = draft_losses(base, transfer, batch)
    logits = base.model(batch.input_ids).logits[0]
    parts = decoder_parts(base.model)
    hidden = draft_hidden(base.model, transfer, run_context(base.model, transfer, batch.input_ids), batch.anchors)
    for k in range(2):
        expected = torch.nn.functional.kl_div(
            parts.head(parts.norm(hidden[0, :, k])).log_softmax(-1),
            logits[batch.anchors[0] + k + 1].log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        torch.testing.assert_close(losses[k], expected, rtol=1e-4, atol=1e-5)


def test_acceptance_counts_the_greedy_token_of_every_position(base: BaseModel, data_folder: Path) -> None:
    sequences = read_data(data_folder, base, 4)
    # W = identity at the last layer repeats the base model's own prediction: its top-1 at step 1 is the share of
    # positions whose token equals the one after it.
    repeats = [
        (s.prompt + s.answer)[i + 2] == (s.prompt + s.answer)[i + 1]
        for s in sequences
        for i in range(len(s.prompt) - 1, len(s.prompt) + len(s.answer) - 2)
    ]
    measured = evaluate(base, TransferLayers((4,), 32), sequences)
    assert measured["anchors"] == len(repeats)
    assert measured["top"]["1"][0] == pytest.approx(sum(repeats) / len(repeats), abs=1e-3)
    assert sum(task["anchors"] for task in measured["tasks"].values()) == len(repeats)


def test_fitting_lowers_the_loss_and_a_killed_run_ends_with_the_same_weights(
    base: BaseModel, data_folder: Path, tmp_path: Path
) -> None:
    sequences = read_data(data_folder, base, 4)
    settings = FitSettings(layers=(2, 3), steps=30, sequences=4, anchors=8, learning_rate=0.02, warmup_steps=2)

    def run(checkpoint: Path, report: Callable[[str], None] = print, **options: Any) -> TransferLayers:
        return fit(base, sequences, settings, checkpoint, Progress(disable=True), report=report, **options)

    whole = run(tmp_path / "whole")
    everything = make_batch(sequences, 2, None, None)
    untrained = TransferLayers((2, 3), 32)
    assert (draft_losses(base, whole, everything) < 0.7 * draft_losses(base, untrained, everything)).all()

    def dies(text: str) -> None:
        if text.startswith("step 20"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", dies, held_out=sequences[:2], evaluate_every=20, checkpoint_every=8)
    resumed = run(tmp_path / "killed")
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_checkpoint_of_another_run_is_refused(base: BaseModel, data_folder: Path, tmp_path: Path) -> None:
    sequences = read_data(data_folder, base, 4)
    for steps, expectation in ((2, None), (3, "with other settings, data or base model")):
        settings = FitSettings(layers=(2,), steps=steps, sequences=2, anchors=4)
        if expectation is None:
            fit(base, sequences, settings, tmp_path / "c", Progress(disable=True))
        else:
            with pytest.raises(InputError, match=expectation):
                fit(base, sequences, settings, tmp_path / "c", Progress(disable=True))
    (tmp_path / "c").write_bytes(b"junk")
    with pytest.raises(InputError, match="is not a checkpoint of ht-train fit"):
        fit(base, sequences, settings, tmp_path / "c", Progress(disable=True))


def test_the_command_line_goes_from_prompts_to_a_transfer_file(
    tiny_checkpoint: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder, out = str(tiny_checkpoint), str(tmp_path / "data"), tmp_path / "t.safetensors"
    short = ["--max-new-tokens", "16", "--batch-size", "4"]
    assert cli.main(["data", model, "--prompts", str(prompts_file), "--out", folder, *short]) == 0
    options = ["--layers", "2,3", "--steps", "4", "--sequences", "2", "--anchors", "4", "--dtype", "float32"]
    arguments = ["fit", model, "--data", folder, "--held-out", folder, "--out", str(out), *options]
    assert cli.main(arguments) == 0
    transfer, about = load_transfer_layers(out, load_base_model(model).identity())
    assert transfer.layers == (2, 3)
    assert about.recipe["steps"] == 4
    capsys.readouterr()
    assert cli.main(["eval", model, "--transfer", str(out), "--data", folder]) == 0
    assert json.loads(capsys.readouterr().out) == about.acceptance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "MODEL", "--prompts", "nowhere.jsonl", "--out", "OUT"], "no prompts file at nowhere.jsonl"),
        (
            ["data", "MODEL", "--prompts", "PROMPTS", "--out", "OUT", "--batch-size", "0"],
            "batch_size must be at least 1",
        ),
        (["fit", "MODEL", "--data", "OUT", "--out", "t"], "is not a data folder"),
        (["fit", "MODEL", "--data", "DATA", "--out", "PROMPTS/t"], "cannot write"),
        (["fit", "MODEL", "--data", "DATA", "--out", "t", "--layers", "9"], "transfer layer 9 does not exist"),
        (["fit", "MODEL", "--data", "DATA", "--out", "t", "--steps", "0"], "steps must be more than 0"),
        (["eval", "MODEL", "--transfer", "nowhere", "--data", "DATA"], "no transfer layers at nowhere"),
    ],
)
def test_a_users_mistake_is_one_line(
    tiny_checkpoint: Path,
    prompts_file: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": tiny_checkpoint, "PROMPTS": prompts_file, "DATA": data_folder, "OUT": tmp_path / "new"}
    words = [str(places.get(word, word)).replace("PROMPTS/", f"{prompts_file}/") for word in arguments]
    assert cli.main(words) == 1
    captured = capsys.readouterr().err
    assert message in captured
    assert "Traceback" not in captured
