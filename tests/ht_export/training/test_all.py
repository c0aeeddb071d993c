"""`ht-train all`: from a model and prompts to transfer layers and a report, whatever interrupts it."""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.transfer import TransferFile, load_transfer_layers, save_transfer_layers
from ht_export.training import cli
from ht_export.training.data import MANIFESTS, AnsweredPrompt, DataFolder
from ht_export.training.recipe import pace, report
from ht_export.training.recipe import run as recipe
from ht_export.training.recipe.choices import Choices
from ht_export.training.recipe.record import RECORDS, Pace
from ht_export.training.settings import FitSettings
from runtime.errors import InputError
from tests.conftest import random_transfer, tiny_llama
from tests.ht_export.model.test_adapters import DOWN, Q, factors, lora, save
from tests.ht_export.training.conftest import QUIET
from tests.ht_export.training.test_fit import assert_equal

SMALL = ["--steps", "6", "--max-new-tokens", "16", "--layers", "2,3", "--sequences", "2", "--anchors", "8"]
PNG = b"\x89PNG"


class KilledError(Exception):
    """Stands for a process that ends."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"id": i, "task": "ab"[i % 2], "prompt": f"Prompt number {i}{'.' * (i % 7)}"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, tiny_engine: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transfer layers of a run that nothing interrupted, with its work folder beside them."""
    out = tmp_path_factory.mktemp("whole") / "transfer.safetensors"
    # As if it had been killed when it had exported its engine, which takes long.
    shutil.copytree(tiny_engine.parent, work(out) / "data" / "engine-fp32")
    assert cli.main(command(tiny_checkpoint, prompts, out, "--curve")) == 0
    return out


def command(model: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    return ["all", str(model), "--prompts", str(prompts), "--out", str(out), *SMALL, *more]


def work(out: Path) -> Path:
    return Path(f"{out}.work")


def with_engine_of(one: Path, out: Path) -> None:
    """Put the engine of a run into the work folder of another: exporting and timing it again takes long."""
    shutil.copytree(work(one) / "data" / "engine-fp32", work(out) / "data" / "engine-fp32")


def numbers(out: Path) -> Any:
    return json.loads((work(out) / "report" / "report.json").read_text())


def test_a_user_who_has_prompts_needs_nothing_else(whole: Path) -> None:
    transfer, about = load_transfer_layers(whole)
    assert transfer.layers == (2, 3)
    assert about.recipe["steps"] == 6
    assert about.acceptance["dtype"] == "float32"
    data, held_out = (MANIFESTS.read(work(whole) / name / "manifest.json") for name in ("data", "held-out"))
    # 5 % of 30 prompts.
    assert (data.sequences, held_out.sequences) == (28, 2)
    assert data.prompts_sha256 != held_out.prompts_sha256
    found = numbers(whole)
    assert found["acceptance"] == about.acceptance
    assert found["gap"]["texts"] == {"trained_on": 28, "held_out": 2}
    assert [step for step, _ in found["history"]["loss"]["step 1"]] == [1, 2, 3, 4, 5, 6]
    assert set(found["history"]["top"]["step 2"]) == {"1", "2", "4", "8"}
    assert found["speedup"]["speedup"] >= 1
    # The engine's passes were timed when it answered the prompts.
    assert "engine" in found["speedup"]["row_cost"]["source"]
    curve = found["learning_curve"]
    assert curve["measured"] == 3
    assert [point["texts"] for point in curve["points"]] == [7, 14, 28, 56, 280]
    assert all(point["low"] <= point["value"] <= point["high"] <= 3 for point in curve["points"])
    told = (work(whole) / "report" / "report.md").read_text()
    for name in ("loss", "top_over_steps", "tokens_per_step", "calibration", "texts"):
        assert f"({name}.png)" in told
        assert (work(whole) / "report" / f"{name}.png").read_bytes().startswith(PNG)
    # Two held-out texts, resampled, have intervals that nobody should believe.
    assert "too few texts to tell: resampling needs 10 of either kind" in told
    assert "and here are 28 and 2. Measure on more" in told
    assert "trained on a folder of 28 texts." in told


def test_prompts_kept_apart_are_never_trained_on(whole: Path) -> None:
    apart = {json.loads(line)["turns"][0] for line in (work(whole) / "held-out.jsonl").read_text().splitlines()}
    answered = [json.loads(line) for path in (work(whole) / "data").glob("shard-*.jsonl") for line in path.open()]
    assert len(apart) == 2
    assert len(answered) == 28
    measured = [json.loads(line) for path in (work(whole) / "held-out").glob("shard-*.jsonl") for line in path.open()]
    assert not {tuple(one["prompt"]) for one in measured} & {tuple(one["prompt"]) for one in answered}


def test_what_is_done_is_not_done_again(
    tiny_checkpoint: Path,
    prompts: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.stat().st_mtime_ns for path in work(whole).rglob("*") if path.is_file()}
    monkeypatch.setattr("ht_export.training.commands.run_data", None)
    monkeypatch.setattr("ht_export.training.commands.run_fit", None)
    monkeypatch.setattr("ht_export.training.commands.run_eval", None)
    assert cli.main(command(tiny_checkpoint, prompts, whole, "--curve")) == 0
    assert before == {path: path.stat().st_mtime_ns for path in work(whole).rglob("*") if path.is_file()}
    assert capsys.readouterr().err.count("done before: ht-train ") == 7


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bool], None]]:
    """Return what lets the run die before or after the work of a stage, told by the words of its command."""
    own = cli._run

    def kill(words: str, after: bool) -> None:
        def runs(options: Any) -> None:
            told = f"{options.command} {getattr(options, 'out', '')}"
            if options.command != "all" and words in told and not after:
                raise KilledError
            own(options)
            if options.command != "all" and words in told:
                raise KilledError

        monkeypatch.setattr(cli, "_run", runs)

    yield kill
    monkeypatch.setattr(cli, "_run", own)


def test_a_run_that_is_killed_around_every_stage_ends_with_the_same_weights(
    tiny_checkpoint: Path, prompts: Path, whole: Path, tmp_path: Path, kill_at: Callable[[str, bool], None]
) -> None:
    out = tmp_path / "transfer.safetensors"
    again = command(tiny_checkpoint, prompts, out)
    with_engine_of(whole, out)
    before, after = False, True
    ends = ("work/data", after), ("work/held-out", before), ("fit ", before), ("fit ", after), ("eval ", after)
    for words, when in (*ends, ("report ", before)):
        kill_at(words, when)
        with pytest.raises(KilledError):
            cli.main(again)
    kill_at("nothing", True)
    assert cli.main(again) == 0
    assert_equal(load_transfer_layers(whole)[0], load_transfer_layers(out)[0])
    assert numbers(out)["acceptance"] == numbers(whole)["acceptance"]
    assert numbers(out)["learning_curve"] is None
    assert not [path for path in out.parent.iterdir() if path.name not in (out.name, work(out).name)]


def test_what_was_taken_away_is_made_again(tiny_checkpoint: Path, prompts: Path, whole: Path, tmp_path: Path) -> None:
    before = load_transfer_layers(whole)
    content = whole.read_bytes()
    whole.unlink()
    assert cli.main(command(tiny_checkpoint, prompts, whole, "--curve")) == 0
    assert_equal(before[0], load_transfer_layers(whole)[0])
    assert load_transfer_layers(whole)[1].acceptance["anchors"] > 0
    whole.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (["--steps", "7"], "--steps"),
        (["--seed", "1"], "--seed"),
        (["--draft-size", "40"], "--draft-size"),
        (["--held-out", "PROMPTS"], "--held-out"),
        (["--max-prompts", "9"], "--max-prompts"),
        (["--dtype", "bfloat16"], "--dtype"),
    ],
)
def test_another_setting_is_an_error_that_names_it(
    tiny_checkpoint: Path, prompts: Path, whole: Path, capsys: pytest.CaptureFixture[str], change: list[str], name: str
) -> None:
    more = [str(prompts) if word == "PROMPTS" else word for word in change]
    assert cli.main(command(tiny_checkpoint, prompts, whole, "--curve", *more)) == 1
    assert f"is the work of a run with another {name} (" in capsys.readouterr().err


def test_steps_follow_from_the_time_there_is(
    tiny_checkpoint: Path, prompts: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, held_out = tmp_path / "t.safetensors", tmp_path / "held-out.jsonl"
    with_engine_of(whole, out)
    held_out.write_text('{"prompt": "Never seen"}\n{"prompt": "Nor this one"}\n')
    options = ["--max-new-tokens", "16", "--hours", "0.0001", "--held-out", str(held_out), "--draft-size", "40"]
    assert cli.main(["all", str(tiny_checkpoint), "--prompts", str(prompts), "--out", str(out), *options]) == 0
    told = capsys.readouterr().err
    assert "steps, ready at about 20" in " ".join(told.split())
    record = RECORDS.read(work(out) / "all.json")
    assert record.pace is not None and record.choices is not None
    assert record.pace.seconds_per_step is not None
    assert record.pace.steps >= 20
    assert load_transfer_layers(out)[0].draft_size == 40
    # What nobody said: two thirds of the depth of four layers.
    assert record.choices.layers == (3, 3, 3)
    assert MANIFESTS.read(work(out) / "data" / "manifest.json").sequences == 30


def test_the_commands_that_are_printed_are_the_stages(
    tiny_checkpoint: Path, prompts: Path, whole: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(command(tiny_checkpoint, prompts, whole, "--curve")) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "done before: " in line]
    words = [shlex.split(line.split("done before: ht-train ")[1]) for line in lines]
    assert [one[0] for one in words] == ["data", "data", "fit", "fit", "fit", "eval", "report"]
    by_hand = words[2]
    by_hand[by_hand.index("--out") + 1] = str(tmp_path / "by-hand.safetensors")
    by_hand[by_hand.index("--checkpoint") + 1] = str(tmp_path / "checkpoint")
    by_hand[by_hand.index("--log") + 1] = str(tmp_path / "log")
    assert cli.main(by_hand) == 0
    assert_equal(load_transfer_layers(whole)[0], load_transfer_layers(tmp_path / "by-hand.safetensors")[0])


def folder_of(path: Path, *answer_lengths: int) -> Path:
    """Make a data folder with answers of so many tokens, a shard each."""
    folder = DataFolder(path, {"base_model": {"name": "tiny", "weights_sha256": "0"}})
    for number, length in enumerate(answer_lengths):
        folder.write_shard(0, number, [AnsweredPrompt(str(number), "", [1], [5] * length)])
    folder.finish(sequences=len(answer_lengths))
    return path


CHOICES = Choices(
    (2, 3), draft_size=None, precision="fp32", dtype="float32", sequences=2, anchors=8, accumulate=1
)  # fmt: skip


def fits(work: Path, choices: Choices, *options: str) -> list[recipe.Stage]:
    """Return the fits of a run and what comes after them."""
    asked = ["all", "model", "--prompts", "prompts.jsonl", "--out", str(work / "t.safetensors"), *options]
    parsed = cli.build_parser().parse_args(asked)
    return list(recipe._fit_stages(parsed, work, choices, Pace(6, 3, 3), recipe.PARTS if parsed.curve else ()))


def said(stages: Sequence[recipe.Stage], option: str) -> list[str]:
    """Return what an option is in each stage that has it."""
    return [stage.words[stage.words.index(option) + 1] for stage in stages if option in stage.words]


@pytest.mark.parametrize("head", [{}, {"draft_size": 40}, {"loss_size": 40}])
def test_each_fit_has_a_name_and_a_checkpoint_of_its_own(tmp_path: Path, head: dict[str, Any]) -> None:
    folder_of(tmp_path / "data", *[9] * 8)
    found = fits(tmp_path, replace(CHOICES, **head), "--curve")
    assert [stage.name for stage in found] == ["fit", "fit-1-of-4", "fit-1-of-2", "eval", "report"]
    assert [Path(path).name for path in said(found, "--checkpoint")] == [
        "fit.checkpoint",
        "fit-1-of-4.checkpoint",
        "fit-1-of-2.checkpoint",
    ]
    for name, size in head.items():
        assert said(found, f"--{name.replace('_', '-')}") == [str(size)] * 3


def test_a_curve_has_half_and_a_quarter_of_the_texts_that_are_trained_on(tmp_path: Path) -> None:
    # Answers that are shorter than the draft steps and the certain token are not.
    folder_of(tmp_path / "data", *[9] * 9, 2, 2, 2)
    assert said(fits(tmp_path, CHOICES, "--curve"), "--max-texts") == ["2", "4"]
    assert said(fits(tmp_path, CHOICES), "--max-texts") == []


def test_too_few_texts_for_a_curve_are_told_before_any_fit(tmp_path: Path) -> None:
    folder_of(tmp_path / "data", 9, 9, 9, 2)
    with pytest.raises(InputError, match="has 3 answers of at least 3 tokens; give more prompts, or leave --curve out"):
        fits(tmp_path, CHOICES, "--curve")


def test_a_folder_that_has_lost_a_shard_is_not_done(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", 9, 9)
    stage = recipe.Stage("data", [], folder / "manifest.json", also=(tmp_path / "engine.json",))
    assert stage.fingerprint() is None
    (tmp_path / "engine.json").touch()
    assert stage.fingerprint() is not None
    (folder / "shard-0-00001.jsonl").unlink()
    assert stage.fingerprint() is None
    (folder / "manifest.json").write_text("{")
    assert stage.fingerprint() is None


def test_layers_that_have_lost_what_was_measured_are_measured_again(tmp_path: Path) -> None:
    out, about = tmp_path / "t.safetensors", tmp_path / "eval.json"
    about.write_text("{}")
    stage = recipe.Stage("eval", [], about, measured=out)
    assert stage.fingerprint() is None
    transfer, model = random_transfer((2, 3)), {"hidden_size": 32, "num_layers": 4}
    save_transfer_layers(out, transfer, TransferFile(model, acceptance={"dtype": "float32"}))
    measured = stage.fingerprint()
    assert measured is not None
    assert measured == stage.fingerprint()
    save_transfer_layers(out, transfer, TransferFile(model, acceptance={"dtype": "bfloat16"}))
    assert stage.fingerprint() not in (None, measured)


def test_an_engine_is_not_what_it_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["all", "model", "--prompts", "prompts.jsonl", "--out", str(tmp_path / "t.onnx")]) == 1
    assert "t.onnx names an engine; transfer layers are a .safetensors file" in capsys.readouterr().err


def test_long_prompts_are_left_out_as_the_user_says(tmp_path: Path) -> None:
    asked = ["all", "model", "--prompts", "prompts.jsonl", "--out", "t.safetensors"]
    for more, longest in ([], "256"), (["--max-prompt-tokens", "1000"], "1000"):
        options = cli.build_parser().parse_args([*asked, *more])
        found = list(recipe._data_stages(options, tmp_path, tmp_path / "held-out.jsonl", CHOICES, answering=True))
        assert said(found, "--max-prompt-tokens") == [longest, longest]
        # The held-out prompts are answered by the first stage's engine.
        assert found[0].also == (tmp_path / "data" / "engine-fp32" / "engine.json",)


STATISTICS = {
    "top": {"1": [0.5, 0.4]},
    "calibration": [{"error": 0.1, "bins": [{"count": 1, "predicted": 0.5, "observed": 1.0}]}] * 2,
}


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({}, True),
        ({"calibration": [{"error": 0, "bins": STATISTICS["calibration"][0]["bins"] * 3}] * 2}, True),  # type: ignore[index]
        ({"top": {"1": [0.5]}}, False),
        ({"top": {"1": ["a", "b"]}}, False),
        ({"top": {"2": [0.5, 0.4]}}, False),
        ({"top": {"1": [0.5, 0.4], "2": "more"}}, False),
        ({"top": [0.5, 0.4]}, False),
        ({"calibration": None}, False),
        ({"calibration": [{"error": 0.1}] * 2}, False),
        ({"calibration": [{"error": 0.1, "bins": [7]}] * 2}, False),
    ],
)
def test_statistics_that_a_report_cannot_show_are_measured_anew(changed: dict[str, Any], shown: bool) -> None:
    assert report._alike({**STATISTICS, **changed}, STATISTICS) is shown


def test_a_slow_machine_is_not_timed_for_long(
    base: BaseModel, sequences: list[AnsweredPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "LONGEST_TIMING", 0.0)
    settings = FitSettings(layers=(2, 3), sequences=2, anchors=8, correction_rank=4, draft_size=40)
    ended: list[int] = []
    seconds = pace._Clock.seconds

    def told(clock: pace._Clock) -> float:
        ended.extend(clock.ends)
        return seconds(clock)

    monkeypatch.setattr(pace._Clock, "seconds", told)
    step, measurement = pace.seconds_per_step(base, sequences, sequences[:2], settings, QUIET)
    assert ended == [1, 2]
    assert step > 0 and measurement > 0


def test_steps_fill_the_time_within_bounds() -> None:
    assert pace.pace_for(1000, 1.0, 10.0, texts=10**6, texts_of_a_step=8) == Pace(890, 89, 50, 1.0)
    # No more than 30 passes over the texts, and no fewer steps than learn anything.
    assert pace.pace_for(1000, 1.0, 0.0, texts=80, texts_of_a_step=8).steps == 300
    slow = pace.pace_for(10, 60.0, 5.0, texts=10**6, texts_of_a_step=8)
    assert (slow.steps, slow.evaluate_every, slow.checkpoint_every) == (20, 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hours", "0"], "--hours must be from"),
        (["--draft-steps", "3", "--layers", "2,3"], "--layers names 2 draft steps and --draft-steps 3; leave one out"),
        (["--max-prompts", "0"], "--max-prompts must be at least 1, not 0"),
        (["--held-out", "nowhere.jsonl"], "--held-out: no prompts file at nowhere.jsonl"),
        (["--prompts", "nowhere.jsonl"], "no prompts file at nowhere.jsonl"),
        (["--layers", "2,9"], "transfer layer 9 does not exist in a model of 4 layers"),
        (["--draft-size", "100000"], "--draft-size must be less than the model's vocabulary of "),
        (["--max-prompt-tokens", "0"], "--max-prompt-tokens must be at least 1, not 0"),
    ],
)
def test_a_users_mistake_is_one_line_before_any_work(
    tiny_checkpoint: Path,
    prompts: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "t.safetensors"
    asked = ["all", str(tiny_checkpoint), "--prompts", str(prompts), "--out", str(out), *options]
    assert cli.main(asked) == 1
    assert message in capsys.readouterr().err
    assert not (work(out) / "data").exists()


def test_one_prompt_cannot_be_trained_on_and_measured(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Alone"}\n{"prompt": " alone "}\n')
    out = tmp_path / "t.safetensors"
    assert cli.main(["all", str(tiny_checkpoint), "--prompts", str(tmp_path / "p.jsonl"), "--out", str(out)]) == 1
    assert "has 1 different prompts, of which none can be kept apart" in capsys.readouterr().err


def test_a_model_with_an_adapter_is_trained_for_with_it(
    tiny_checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama()
    adapter = save(tmp_path / "mine", factors(**{name: lora(model.get_submodule(name)) for name in (Q, DOWN)}))
    out = tmp_path / "transfer.safetensors"
    asked = command(tiny_checkpoint, prompts, out, "--adapter", str(adapter))
    assert cli.main(asked) == 0
    told = " ".join(capsys.readouterr().err.split())
    for stage in ("data", "fit", "eval", "report"):
        assert f"ht-train {stage} {tiny_checkpoint} --adapter {adapter} --" in told
    assert f"ht-export {tiny_checkpoint} --adapter {adapter} --transfer {out} --out engine.onnx" in told
    merged = load_base_model(str(tiny_checkpoint), adapters=[adapter]).identity()["weights_sha256"]
    assert load_transfer_layers(out)[1].base_model["weights_sha256"] == merged
    assert MANIFESTS.read(work(out) / "data" / "manifest.json").base_model["weights_sha256"] == merged
    assert (work(out) / "report" / "report.md").is_file()
    # The same adapter, and nothing else, goes on.
    assert cli.main(asked) == 0
    assert cli.main(command(tiny_checkpoint, prompts, out)) == 1
    assert "is the work of a run with another --adapter (" in capsys.readouterr().err


def test_every_stage_leaves_what_tells_that_it_is_done(tmp_path: Path) -> None:
    stage = recipe.Stage("fit", [], tmp_path / "t.safetensors")
    assert stage.fingerprint() is None
    stage.left.write_bytes(b"junk")
    assert stage.fingerprint() is None
