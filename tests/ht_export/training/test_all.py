"""`ht-train all`: from a model and prompts to transfer layers and a report, whatever interrupts it."""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.transfer import load_transfer_layers
from ht_export.training import cli
from ht_export.training.data import MANIFESTS, AnsweredPrompt
from ht_export.training.fit import FitSettings
from ht_export.training.recipe import pace
from ht_export.training.recipe import run as recipe
from ht_export.training.recipe.record import RECORDS, Pace
from tests.conftest import tiny_llama
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
    report = (work(whole) / "report" / "report.md").read_text()
    for name in ("loss", "top_over_steps", "tokens_per_step", "calibration", "texts"):
        assert f"({name}.png)" in report
        assert (work(whole) / "report" / f"{name}.png").read_bytes().startswith(PNG)
    # Two held-out texts, resampled, have intervals that nobody should believe.
    assert "too few texts to tell: resampling needs 10 of either kind" in report
    assert "and here are 28 and 2. Measure on more" in report
    assert "trained on a folder of 28 texts." in report


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
