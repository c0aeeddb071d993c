import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ht_export.alone import alone
from ht_export.model.checkpoint import load_base_model
from ht_export.model.transfer import TransferLayers, load_transfer_layers, save_transfer_layers
from ht_export.training import cli
from ht_export.training.data import read_data

PNG = b"\x89PNG"
SHORT = ["--sequences", "2", "--anchors", "4", "--dtype", "float32"]


def test_the_commands_go_from_prompts_to_measured_transfer_layers(
    tiny_checkpoint: Path,
    prompts_file: Path,
    held_out_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held_out = str(held_out_folder)
    model, folder, out = str(tiny_checkpoint), str(tmp_path / "data"), tmp_path / "t.safetensors"
    lengths = ["--max-new-tokens", "24", "--batch-size", "4"]
    assert cli.main(["data", model, "--prompts", str(prompts_file), "--out", folder, *lengths]) == 0
    places = ["--data", folder, "--held-out", held_out, "--out", str(out), "--log", str(tmp_path / "log")]
    assert cli.main(["fit", model, *places, "--layers", "2,3", "--steps", "4", "--evaluate-every", "2", *SHORT]) == 0
    assert "wrote " in (said := capsys.readouterr().err)
    assert "anchors/s, peak memory" in said
    transfer, about = load_transfer_layers(out, load_base_model(model).identity())
    assert transfer.layers == (2, 3)
    assert about.recipe["steps"] == 4
    assert about.recipe["report"]["peak_memory"] > 0
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert {"loss/step_1", "loss/step_2", "held_out/step_1_top_1", "learning_rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/step_1")] == [1, 2, 3, 4]

    arguments = ["eval", model, "--transfer", str(out), "--data", held_out, "--out", str(tmp_path / "eval")]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == about.acceptance
    assert json.loads((tmp_path / "eval" / "eval.json").read_text()) == about.acceptance
    plots = sorted((tmp_path / "eval").glob("*.png"))
    assert [plot.stem for plot in plots] == ["acceptance", "calibration", "ranks", "tokens_per_step"]
    assert all(plot.read_bytes().startswith(PNG) for plot in plots)


def test_transfer_layers_are_trained_further(
    tiny_checkpoint: Path, tiny_transfer: Path, data_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "further.safetensors"
    arguments = ["fit", str(tiny_checkpoint), "--data", str(data_folder), "--start", str(tiny_transfer)]
    still = ["--steps", "1", "--learning-rate", "1e-12", *SHORT]
    assert cli.main([*arguments, "--out", str(out), *still]) == 0
    before, _ = load_transfer_layers(tiny_transfer)
    after, about = load_transfer_layers(out)
    assert after.layers == before.layers
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor)
    assert about.recipe["init"] == "file"
    assert about.recipe["start"] == {}
    # The checkpoint is of a run from that file, and of no other.
    save_transfer_layers(tmp_path / "other.safetensors", TransferLayers((3, 1, 3), 32, 4), about)
    arguments[-1] = str(tmp_path / "other.safetensors")
    assert cli.main([*arguments, "--out", str(out), *still]) == 1


def test_several_data_folders_are_trained_on_together(
    tiny_checkpoint: Path, tiny_engine: Path, prompts_file: Path, data_folder: Path, tmp_path: Path
) -> None:
    sampled, out = tmp_path / "sampled", tmp_path / "t.safetensors"
    lengths = ["--max-new-tokens", "12", "--max-prompts", "10"]
    draws = ["--temperature", "0.8"]
    made = ["data", str(tiny_engine), "--prompts", str(prompts_file), "--out", str(sampled), *lengths, *draws]
    assert cli.main(made) == 0
    short = ["--steps", "2", "--layers", "2", *SHORT]
    fit = ["fit", str(tiny_checkpoint), "--data", str(data_folder), str(sampled), "--out", str(out), *short]
    assert cli.main(fit) == 0
    base = load_base_model(str(tiny_checkpoint))
    about = load_transfer_layers(out, base.identity())[1]
    answers = [*read_data(data_folder, base, 2), *read_data(sampled, base, 2)]
    assert about.recipe["data"]["sequences"] == len(answers) > 10
    assert about.recipe["data"]["answer_tokens"] == sum(len(one.answer) for one in answers)


def test_the_same_work_is_not_done_twice_at_once(
    tiny_checkpoint: Path, tiny_engine: Path, prompts_file: Path, data_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, out = tmp_path / "data", tmp_path / "t.safetensors"
    asked = {
        data: ["data", str(tiny_engine), "--prompts", str(prompts_file), "--out", str(data)],
        tmp_path / "t.safetensors.checkpoint":
            ["fit", str(tiny_checkpoint), "--data", str(data_folder), "--out", str(out), "--steps", "1"],
    }  # fmt: skip
    for held, words in asked.items():
        with alone(held, "not held"):
            assert cli.main(words) == 1
        assert f"another ht-train is at work on {held}; wait until it has ended" in capsys.readouterr().err
    assert not any(data.iterdir())
    assert not out.exists()
    assert cli.main(asked[data]) == 0
    assert (data / "manifest.json").is_file()
    assert not list(tmp_path.glob(".*.lock"))


def test_eval_stores_its_statistics_and_leaves_the_weights(
    tiny_checkpoint: Path, tiny_transfer: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(tiny_transfer.read_bytes())
    options = ["--tree-rows", "6", "--pseudo-rows", "6,3,1"]
    arguments = ["eval", str(tiny_checkpoint), "--transfer", str(copy), "--data", str(data_folder), "--store", *options]
    assert cli.main(arguments) == 0
    transfer, about = load_transfer_layers(copy)
    assert about.acceptance == json.loads(capsys.readouterr().out)
    assert about.acceptance["sizes"]["pseudo_rows"] == [6, 3, 1]
    before, _ = load_transfer_layers(tiny_transfer)
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(transfer.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "MODEL", "--prompts", "nowhere.jsonl", "--out", "OUT"], "no prompts file at nowhere.jsonl"),
        (
            ["data", "MODEL", "--prompts", "PROMPTS", "--out", "OUT", "--batch-size", "0"],
            "--batch-size must be at least 1, not 0",
        ),
        (
            ["data", "MODEL", "--prompts", "PROMPTS", "--out", "OUT", "--temperature", "-1"],
            "temperature and top_k must be at least 0",
        ),
        (
            ["data", "MODEL", "--prompts", "PROMPTS", "--out", "OUT", "--temperature", "1e-320"],
            "temperature must be 0 (greedy) or at least 0.01, not 1e-320",
        ),
        (["data", "MODEL", "--prompts", "PROMPTS", "--out", "PROMPTS/d"], "cannot write"),
        (["data", "ENGINE", "--prompts", "PROMPTS", "--out", "OUT", "--device", "cuda"], "cuda"),
        (["data", "ENGINE", "--prompts", "PROMPTS", "--out", "OUT", "--precision", "int8"], "is an engine"),
        (["data", "nowhere.onnx", "--prompts", "PROMPTS", "--out", "OUT"], "no engine at nowhere.onnx"),
        (["data", "MODEL", "--prompts", "PROMPTS", "--out", "OUT", "--part", "5/4"], "part must be I/N"),
        (["merge", "DATA", "DATA", "--out", "OUT"], "are both part 1/1; give each part once"),
        (["fit", "MODEL", "--data", "OUT", "--out", "t"], "is not a data folder"),
        (["fit", "MODEL", "--data", "DATA", "DATA", "--out", "t"], "twice; name each folder once"),
        (["fit", "MODEL", "--data", "DATA", "OUT", "--out", "t"], "is not a data folder"),
        (["fit", "MODEL", "--data", "DATA", "--out", "PROMPTS/t"], "cannot write"),
        (["fit", "MODEL", "--data", "DATA", "--out", "t", "--layers", "9"], "transfer layer 9 does not exist"),
        (["fit", "MODEL", "--data", "DATA", "--out", "t", "--steps", "0"], "steps must be more than 0"),
        (
            ["fit", "MODEL", "--data", "DATA", "--out", "t", "--layers", "2,3", "--step-weights", "1"],
            "step_weights has 1 numbers for 2 draft steps",
        ),
        (["fit", "MODEL", "--data", "DATA", "--out", "t", "--patience", "2"], "stopping early needs held-out data"),
        (
            ["fit", "MODEL", "--data", "DATA", "--out", "t", "--checkpoint-every", "0"],
            "checkpoint_every must be at least",
        ),
        (
            ["fit", "MODEL", "--data", "DATA", "--out", "t", "--evaluate-every", "0"],
            "evaluate_every must be at least 1",
        ),
        (["fit", "MODEL", "--data", "DATA", "--out", "t", "--evaluate-texts", "0"], "must be at least 1, not 0"),
        (
            ["fit", "MODEL", "--data", "DATA", "--out", "t", "--learning-rate", "nan"],
            "learning_rate must be more than 0",
        ),
        (
            ["fit", "MODEL", "--data", "DATA", "--out", "t", "--learning-rate", "1e308"],
            "learning_rate must be at most 1000, not 1e+308",
        ),
        (
            ["fit", "MODEL", "--data", "DATA", "--out", "t", "--correction-rank", "1000000000000000000"],
            "correction_rank must be at most 65536",
        ),
        (
            ["fit", "MODEL", "--data", "DATA", "--out", "t", "--accumulate", "1000000000000000000"],
            "accumulate must be at most 1000000",
        ),
        (
            ["fit", "MODEL", "--data", "DATA", "--out", "MODEL/model.safetensors"],
            "--out is there and would be replaced, and ",
        ),
        (
            ["fit", "MODEL", "--data", "DATA", "--out", "t", "--checkpoint", "./t"],
            "--checkpoint t is --out too; choose another name",
        ),
        (["fit", "MODEL", "--data", "DATA", "--out", "t", "--seed", "-1"], "seed must be at least 0, not -1"),
        (["fit", "MODEL", "--data", "DATA", "--out", "t", "--log", "PROMPTS"], "cannot write"),
        (["fit", "MODEL", "--data", "DATA", "--out", "t", "--checkpoint", "PROMPTS/c"], "cannot write"),
        (["data", "MODEL", "--prompts", "PROMPTS", "--out", "OUT", "--seed", "-1"], "seed must be at least 0, not -1"),
        (
            ["data", "ENGINE", "--prompts", "PROMPTS", "--out", "OUT", "--max-new-tokens", "256"],
            "leave no room for a prompt in the model's context of 256",
        ),
        (["eval", "MODEL", "--transfer", "nowhere", "--data", "DATA"], "no transfer layers at nowhere"),
        (
            ["eval", "MODEL", "--transfer", "TRANSFER", "--data", "DATA", "--tree-rows", "65"],
            "--tree-rows 65: at most 64 can be simulated",
        ),
        (
            ["eval", "MODEL", "--transfer", "TRANSFER", "--data", "DATA", "--pseudo-rows", "0,2,2"],
            "a draft step needs the steps before it",
        ),
        (
            ["sweep", "MODEL", "--data", "DATA", "--held-out", "HELD_OUT", "--out", "OUT", "--draft-steps", "0"],
            "--draft-steps must be at least 1, not 0",
        ),
        (
            ["sweep", "MODEL", "--data", "DATA", "--held-out", "HELD_OUT", "--out", "OUT", "--placement", "9,9"],
            "transfer layer 9 does not exist",
        ),
        (
            ["sweep", "MODEL", "--data", "DATA", "--held-out", "HELD_OUT", "--out", "OUT", "--row-cost", "3"],
            "between 0 and 1 plain passes, not 3.0",
        ),
        (
            ["sweep", "MODEL", "--data", "DATA", "--held-out", "HELD_OUT", "--out", "OUT", "--steps", "1"],
            "not 3 rungs and 1 steps",
        ),
        (
            ["sweep", "MODEL", "--data", "DATA", "--held-out", "HELD_OUT", "--out", "OUT", "--rungs", "1" + "0" * 18],
            "steps at least 2 to the power of rungs - 1; not 1000000000000000000 rungs and 200 steps",
        ),
        (
            ["sweep", "MODEL", "--data", "DATA", "--held-out", "DATA", "--out", "OUT"],
            "answer prompts that are in --data",
        ),
        (["fit", "MODEL", "--data", "DATA", "--held-out", "DATA", "--out", "t"], "10 of the 10 texts of --held-out"),
        (["fit", "MODEL", "--data", "DATA", "--out", "t", "--start", "nowhere"], "no transfer layers at nowhere"),
        (
            ["fit", "MODEL", "--data", "DATA", "--out", "t", "--start", "TRANSFER", "--layers", "2,3"],
            "and ((2, 3), 32, 4) are asked for; leave those options out",
        ),
    ],
)
def test_a_users_mistake_is_one_line(
    tiny_checkpoint: Path,
    prompts_file: Path,
    data_folder: Path,
    held_out_folder: Path,
    tiny_transfer: Path,
    tiny_engine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": tiny_checkpoint, "PROMPTS": prompts_file, "DATA": data_folder, "OUT": tmp_path / "new"}
    places |= {"HELD_OUT": held_out_folder, "ENGINE": tiny_engine}
    places["TRANSFER"] = tiny_transfer
    words = [
        str(places.get(word, word)).replace("PROMPTS/", f"{prompts_file}/").replace("MODEL/", f"{tiny_checkpoint}/")
        for word in arguments
    ]
    assert cli.main(words) == 1
    captured = capsys.readouterr().err
    assert message in captured
    assert "Traceback" not in captured
