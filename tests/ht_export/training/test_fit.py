import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.transfer import TransferLayers, load_transfer_layers
from ht_export.training import cli
from ht_export.training import fit as fit_module
from ht_export.training import trainer as trainer_module
from ht_export.training.batches import make_batch
from ht_export.training.data import AnsweredPrompt, fingerprint
from ht_export.training.drafts import run_context
from ht_export.training.features import FeatureCache
from ht_export.training.fit import fit
from ht_export.training.memory import estimate
from ht_export.training.optimizers import make_optimizers
from ht_export.training.ridge import RidgeRegression
from ht_export.training.settings import FitSettings
from ht_export.training.trainer import anchor_losses
from runtime.errors import InputError
from tests.ht_export.training.conftest import QUIET

SETTINGS = FitSettings(
    layers=(2, 3),
    steps=30,
    sequences=4,
    anchors=8,
    init="identity",
    correction_rank=4,
    learning_rate=0.02,
    warmup_steps=2,
)


def run(
    base: BaseModel, data: list[AnsweredPrompt], checkpoint: Path, settings: FitSettings = SETTINGS, **options: Any
) -> TransferLayers:
    options.setdefault("report", lambda _: None)
    transfer, _ = fit(base, data, settings, checkpoint, QUIET, **options)
    return transfer


def losses_of(base: BaseModel, transfer: TransferLayers, sequences: list[AnsweredPrompt]) -> torch.Tensor:
    batch = make_batch(sequences, transfer.num_steps, None, None)
    context = run_context(base.model, transfer.layers, batch.input_ids)
    return anchor_losses(base, transfer, batch, context, replace(SETTINGS, layers=transfer.layers).objective)


def assert_equal(one: TransferLayers, other: TransferLayers) -> None:
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0)


def test_fitting_lowers_the_loss(base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path) -> None:
    untrained = losses_of(base, TransferLayers((2, 3), 32), sequences)
    assert (losses_of(base, run(base, sequences, tmp_path / "c"), sequences) < 0.7 * untrained).all()


def test_muon_trains_the_maps_and_adamw_the_rest(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path
) -> None:
    transfer = TransferLayers((2, 3), 32, 4)
    muon, adamw = make_optimizers(transfer, transfer.maps, 0.01)
    assert (type(muon), type(adamw)) == (torch.optim.Muon, torch.optim.AdamW)
    by_muon, by_adamw = (
        {id(one) for group in optimizer.param_groups for one in group["params"]} for optimizer in (muon, adamw)
    )
    assert by_muon == {id(linear.weight) for linear in transfer.linears}
    assert by_adamw == {id(one) for one in transfer.parameters()} - by_muon
    untrained = losses_of(base, TransferLayers((2, 3), 32), sequences)
    trained = run(base, sequences, tmp_path / "c", replace(SETTINGS, optimizer="muon"))
    assert (losses_of(base, trained, sequences) < 0.85 * untrained).all()
    with pytest.raises(InputError, match="is the checkpoint of a run with another optimizer"):
        run(base, sequences, tmp_path / "c")
    with pytest.raises(InputError, match="optimizer must be one of adamw, muon, not sgd"):
        replace(SETTINGS, optimizer="sgd")


def test_the_regression_is_the_best_affine_map_to_the_later_state(
    base: BaseModel, sequences: list[AnsweredPrompt]
) -> None:
    transfer = TransferLayers((2, 3), 32)
    regression = RidgeRegression(transfer)
    contexts = []
    for sequence in sequences:
        context = run_context(base.model, transfer.layers, torch.tensor([sequence.tokens]))
        regression.add(context, [len(sequence)])
        contexts.append(context)
    regression.solve()

    def error(k: int, change: float) -> float:
        torch.manual_seed(0)
        weight = transfer.linears[k].weight + change * torch.randn(32, 32)
        total = 0.0
        for context in contexts:
            states = context.hidden[transfer.layers[k]][0, 4:]
            used = len(states) - transfer.num_steps
            found = states[:used] @ weight.T + transfer.linears[k].bias
            total += float((found - states[k + 1 : k + 1 + used]).square().sum())
        return total

    for k in range(2):
        assert error(k, 0.0) < min(error(k, 1e-2), error(k, -1e-2))


def test_the_regression_beats_the_identity(base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path) -> None:
    one_step = replace(SETTINGS, init="ridge", steps=1, learning_rate=1e-9)
    regressed = losses_of(base, run(base, sequences, tmp_path / "c", one_step), sequences)
    assert (regressed < losses_of(base, TransferLayers((2, 3), 32), sequences)).all()


def test_the_regression_says_when_the_data_is_too_small(base: BaseModel, tmp_path: Path) -> None:
    few = [AnsweredPrompt("0", "", [5, 6, 7], [8, 9, 10, 11, 12])]
    with pytest.raises(InputError, match=r"has 2 positions for the initial regression of 33 unknowns"):
        run(base, few, tmp_path / "c", replace(SETTINGS, init="ridge"))


@pytest.mark.parametrize(("patience", "optimizer"), [(0, "adamw"), (5, "adamw"), (0, "muon")])
def test_a_fit_that_was_interrupted_ends_with_the_same_weights(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path, patience: int, optimizer: str
) -> None:
    settings = replace(SETTINGS, patience=patience, optimizer=optimizer, correction_rank=4)
    measured = {"held_out": sequences[:2], "evaluate_every": 10}
    whole = run(base, sequences, tmp_path / "whole", settings, **measured)

    def dies(text: str) -> None:
        if text.startswith("step 20") and "held-out" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, sequences, tmp_path / "killed", settings, report=dies, checkpoint_every=8, **measured)
    assert_equal(whole, run(base, sequences, tmp_path / "killed", settings, **measured))


def test_a_fit_killed_twice_with_sigkill_ends_with_the_same_weights(
    tiny_checkpoint: Path, data_folder: Path, tmp_path: Path
) -> None:
    def command(out: Path) -> list[str]:
        options = "--layers 2,3 --steps 100 --sequences 4 --anchors 8 --checkpoint-every 10 --dtype float32"
        places = ["--data", str(data_folder), "--out", str(out)]
        return [sys.executable, "-m", "ht_export.training.cli", "fit", str(tiny_checkpoint), *places, *options.split()]

    def steps_done(checkpoint: Path) -> int:
        if not checkpoint.exists():
            return 0
        with safe_open(checkpoint, framework="pt") as file:
            return json.loads(file.metadata()["fit"])["step"]

    assert cli.main(command(tmp_path / "whole.safetensors")[3:]) == 0
    killed = tmp_path / "killed.safetensors"
    checkpoint = Path(f"{killed}.checkpoint")
    for _ in range(2):
        before = steps_done(checkpoint)
        process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while steps_done(checkpoint) <= before:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert steps_done(checkpoint) < 100
    subprocess.run(command(killed), check=True, capture_output=True, timeout=300)
    assert_equal(load_transfer_layers(tmp_path / "whole.safetensors")[0], load_transfer_layers(killed)[0])


def test_accumulated_batches_are_one_large_batch(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path
) -> None:
    # All texts, every anchor: only the split into batches differs.
    equal = [replace(s, prompt=s.prompt[:4], answer=s.answer[:12]) for s in sequences[:8]]
    together = run(base, equal, tmp_path / "1", replace(SETTINGS, steps=1, sequences=8, anchors=99))
    apart = run(base, equal, tmp_path / "2", replace(SETTINGS, steps=1, sequences=4, accumulate=2, anchors=99))
    for name, tensor in together.state_dict().items():
        torch.testing.assert_close(apart.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_two_processes_share_a_step_and_reach_the_same_weights(
    tiny_checkpoint: Path, data_folder: Path, tmp_path: Path
) -> None:
    def command(out: str) -> list[str]:
        options = "--layers 2,3 --steps 5 --sequences 2 --anchors 8 --accumulate 2 --dtype float32 --device cpu"
        places = ["--data", str(data_folder), "--out", str(tmp_path / out)]
        return ["ht_export.training.cli", "fit", str(tiny_checkpoint), *places, *options.split()]

    # Its processes find each other through ports that something else may take: the launcher may start them once more.
    restarts = ["--max-restarts", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *restarts]
    assert cli.main(command("one")[1:]) == 0
    done = subprocess.run([*torchrun, "-m", *command("two")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_transfer_layers(tmp_path / name)[0] for name in ("one", "two"))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_feature_cache_changes_nothing_and_is_made_once(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(SETTINGS, steps=4)
    without = run(base, sequences, tmp_path / "without", short)
    cached = run(base, sequences, tmp_path / "with", short, feature_cache=tmp_path / "cache")
    for name, tensor in without.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    with monkeypatch.context() as without_the_base_model:
        without_the_base_model.setattr(trainer_module, "run_context", None)
        without_the_base_model.setattr("ht_export.training.features.run_context", None)
        assert_equal(cached, run(base, sequences, tmp_path / "again", short, feature_cache=tmp_path / "cache"))
    # Made for layers 2 and 3, it serves layer 3 alone.
    alone = replace(short, layers=(3,))
    served = run(base, sequences, tmp_path / "c", alone, feature_cache=tmp_path / "cache")
    for name, tensor in run(base, sequences, tmp_path / "d", alone).state_dict().items():
        torch.testing.assert_close(served.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
    with pytest.raises(InputError, match=r"holds states of layers 2, 3, 4, and layers 1, 3, 4 are needed"):
        FeatureCache(tmp_path / "cache", base, (1, 3), sequences, QUIET)
    with pytest.raises(InputError, match="holds features of another data_sha256"):
        FeatureCache(tmp_path / "cache", base, (2, 3), sequences[1:], QUIET)
    file = tmp_path / "cache" / "features-00000.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"features-00000\.safetensors is not a valid file of features"):
        run(base, sequences, tmp_path / "more", short, feature_cache=tmp_path / "cache")


def test_a_model_that_has_not_run_yet_is_fitted_with_a_whole_cache(
    base: BaseModel, sequences: list[AnsweredPrompt], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    short = replace(SETTINGS, steps=1)
    once = run(base, sequences, tmp_path / "once", short, feature_cache=tmp_path / "cache")
    # As a command that continues a killed one finds it.
    fresh = load_base_model(str(tiny_checkpoint))
    assert_equal(once, run(fresh, sequences, tmp_path / "again", short, feature_cache=tmp_path / "cache"))


FEATURES_OF = '{"weights_sha256": "a", "dtype": "float32", "data_sha256": "b", "state_layers": '


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{", "truncated"),
        ("{}", "missing required field"),
        (FEATURES_OF + '"2"}', r"`\$\.state_layers`, which is '2'"),
        (FEATURES_OF + "[]}", r"length >= 1 - at `\$\.state_layers`"),
        (FEATURES_OF + "[-1, 4]}", r"`int` >= 0 - at `\$\.state_layers\[0\]`, which is -1"),
        (FEATURES_OF + "[3, 2, 4]}", "state_layers must rise"),
        (FEATURES_OF + "[" * 100_000, "nested too deeply|got `array`"),
        (FEATURES_OF + "[2, 1000000000]}", "its last layer is 1000000000, not 4"),
    ],
)
def test_a_damaged_description_of_features(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path, content: str, cause: str
) -> None:
    content = content.replace('"a"', f'"{base.weights_sha256}"').replace('"b"', f'"{fingerprint(sequences)}"')
    (tmp_path / "features.json").write_text(content)
    with pytest.raises(InputError, match=rf"features\.json is not a valid description of features .*({cause})"):
        FeatureCache(tmp_path, base, (2, 3), sequences, QUIET)


def test_features_of_another_shape(base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, base, (3,), sequences[:1], QUIET)
    batch = make_batch(sequences[:1], 2, None, None)
    save_file({"0": torch.zeros(1, 1)}, tmp_path / "features-00000.safetensors")
    with pytest.raises(InputError, match=r"is not a valid file of features \(text 0 is of shape \[1, 1\]\)"):
        cache.context(batch)
    save_file({"1": torch.zeros(1, 1)}, tmp_path / "features-00000.safetensors")
    with pytest.raises(InputError, match="is not a valid file of features"):
        cache.context(batch)


def test_a_feature_cache_larger_than_the_disk_is_not_begun(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"MiB more in .* and 0 MiB are free; choose another disk"):
        run(base, sequences, tmp_path / "c", feature_cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_a_fit_stops_when_held_out_text_gains_nothing_and_keeps_the_best_weights(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.4, 2.3, 0.0])
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(_: BaseModel, transfer: TransferLayers, __: list[AnsweredPrompt]) -> dict[str, Any]:
        seen.append({name: tensor.clone() for name, tensor in transfer.state_dict().items()})
        return {"kl": [next(losses), 0.0], "top": {str(n): [0.0, 0.0] for n in (1, 2, 4, 8)}}

    monkeypatch.setattr(fit_module, "evaluate", evaluate)
    settings = replace(SETTINGS, patience=3)
    transfer, report = fit(
        base, sequences, settings, tmp_path / "c", QUIET, held_out=sequences, evaluate_every=4, report=lambda _: None
    )
    assert (report.steps, report.best_step) == (20, 8)
    for name, tensor in transfer.state_dict().items():
        torch.testing.assert_close(tensor, seen[1][name], rtol=0, atol=0)
    with pytest.raises(InputError, match="needs held-out data"):
        run(base, sequences, tmp_path / "d", settings)


def test_step_weights_decide_what_is_learned(base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path) -> None:
    only_first = run(base, sequences, tmp_path / "c", replace(SETTINGS, steps=3, step_weights=(1.0, 0.0)))
    untrained = TransferLayers((2, 3), 32)
    torch.testing.assert_close(only_first.linears[1].weight, untrained.linears[1].weight)
    assert not torch.equal(only_first.linears[0].weight, untrained.linears[0].weight)


TEXTS = [AnsweredPrompt(str(number), "", [1, 5], list(range(40 + number, 60))) for number in range(4)]


@pytest.mark.parametrize("asked", [{"loss_choice": 0.5}, {"loss_size": 40}, {"draft_size": 40}, {"draft_texts": [[7]]}])
def test_a_checkpoint_with_another_loss_is_refused_by_a_run_that_does_not_ask_for_it(
    base: BaseModel, tmp_path: Path, asked: dict[str, Any]
) -> None:
    plain: dict[str, Any] = {
        "layers": (2,),
        "steps": 1,
        "sequences": 2,
        "anchors": 4,
        "init": "identity",
        "correction_rank": 0,
    }
    texts = {"draft_texts": asked["draft_texts"]} if "draft_texts" in asked else {}
    more = {} if texts else asked
    checkpoint = tmp_path / "checkpoint"
    fit(base, TEXTS, FitSettings(**{**plain, **more}), checkpoint, QUIET, **texts)
    with pytest.raises(InputError, match=f"is the checkpoint of a run with another {next(iter(asked))} "):
        fit(base, TEXTS, FitSettings(**plain), checkpoint, QUIET)
    # As they were: it goes on.
    fit(base, TEXTS, FitSettings(**{**plain, **more}), checkpoint, QUIET, **texts)


def test_a_checkpoint_of_another_run_is_refused(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path
) -> None:
    short = replace(SETTINGS, steps=2)
    run(base, sequences, tmp_path / "c", short)
    for other, name in (
        (replace(short, steps=3), "steps"),
        (replace(short, learning_rate=0.5), "learning_rate"),
        (replace(short, layers=(2, 2)), "layers"),
    ):
        with pytest.raises(InputError, match=f"is the checkpoint of a run with another {name}"):
            run(base, sequences, tmp_path / "c", other)
    with pytest.raises(InputError, match="is the checkpoint of a run with another data"):
        run(base, sequences[1:], tmp_path / "c", short)
    (tmp_path / "c").write_bytes(b"junk")
    with pytest.raises(InputError, match="is not a valid safetensors file of ht-train fit"):
        run(base, sequences, tmp_path / "c", short)


@pytest.mark.parametrize(
    "change",
    ["no metadata", "no optimizer", "wrong shape", "wrong optimizer", "half of the best", "null loss", "steps"],
)
def test_a_damaged_checkpoint_is_refused(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path, change: str
) -> None:
    checkpoint = tmp_path / "c"
    short = replace(SETTINGS, steps=2)
    run(base, sequences, checkpoint, short)
    with safe_open(checkpoint, framework="pt") as file:
        about = json.loads(file.metadata()["fit"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if change == "no optimizer":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("exp_avg")}
    elif change == "wrong shape":
        tensors["weight/maps.0.weight"] = torch.zeros(3, 3)
    elif change == "wrong optimizer":
        tensors["optimizer/maps.0.weight/exp_avg"] = torch.zeros(3, 3)
    elif change == "half of the best":
        tensors["best/maps.0.weight"] = tensors["weight/maps.0.weight"].clone()
    elif change == "steps":
        about["step"] = 1 << 70
    elif change == "null loss":
        about["best_loss"] = None
    save_file(tensors, checkpoint, metadata={"fit": "[]" if change == "no metadata" else json.dumps(about)})
    with pytest.raises(InputError, match=r"is not a valid .* of ht-train fit .*; delete it to start again"):
        run(base, sequences, checkpoint, short)


def test_a_loss_that_is_not_finite_stops_the_fit_before_a_checkpoint(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "anchor_losses", lambda *_: torch.tensor([1.0, torch.nan]))
    with pytest.raises(InputError, match=r"the loss is not finite at step 1 \(1\.000/nan\); lower --learning-rate"):
        run(base, sequences, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_processes_that_cannot_share_a_step_evenly(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="2 processes cannot share 1 batches of a step evenly"):
        run(base, sequences, tmp_path / "c", accelerator=SimpleNamespace(num_processes=2))


def test_a_run_at_a_constant_rate_can_be_made_longer(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path
) -> None:
    constant = replace(SETTINGS, schedule="constant")
    run(base, sequences, tmp_path / "c", replace(constant, steps=10))
    longer = run(base, sequences, tmp_path / "c", replace(constant, steps=20))
    assert_equal(run(base, sequences, tmp_path / "d", replace(constant, steps=20)), longer)


def test_too_little_memory_is_said_beforehand(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ht_export.training.memory.free_memory", lambda _: 1 << 20)
    with pytest.raises(InputError, match=r"needs about \d+ MiB more memory .* and 1 MiB are free on cpu; lower"):
        run(base, sequences, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    transfer = TransferLayers((2, 3), 32)
    small, large = (estimate(base, transfer, 4, anchors, 64) for anchors in (8, 16))
    assert small.total < large.total


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "c"
    constant = replace(SETTINGS, schedule="constant")
    run(base, sequences, checkpoint, replace(constant, steps=10))
    before = checkpoint.read_bytes()
    # No file may grow past this, as on a disk that fills up while one is written.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*; choose a writable folder with free space"):
            run(base, sequences, checkpoint, replace(constant, steps=20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert checkpoint.read_bytes() == before
    assert list(tmp_path.iterdir()) == [checkpoint]
