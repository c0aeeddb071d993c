"""A draft head in training: which tokens it has, what it learns, and what it is measured by."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import kl_div, one_hot

from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.correction import correction_tables
from ht_export.model.families import decoder_parts
from ht_export.model.reference import HiddenTransferModel
from ht_export.model.transfer import load_transfer_layers
from ht_export.training import cli
from ht_export.training.batches import make_batch
from ht_export.training.cost import RowCosts
from ht_export.training.data import AnsweredPrompt
from ht_export.training.draft_tokens import choose_draft_tokens, covered
from ht_export.training.evaluate import evaluate, predict
from ht_export.training.features import FeatureCache
from ht_export.training.fit import fit
from ht_export.training.losses import Objective, draft_losses, log_normalisers
from ht_export.training.memory import estimate
from ht_export.training.settings import FitSettings
from ht_export.training.simulate import advances
from ht_export.verify.passes import ReferenceEngine
from runtime.drafting.drafter import Drafter
from runtime.drafting.sizing import FixedSizes
from runtime.drafting.transfer_drafts import TransferDrafts
from runtime.errors import InputError
from runtime.tree import TreeSizes
from tests.conftest import DRAFT_TOKENS, random_transfer
from tests.ht_export.training.conftest import QUIET
from tests.runtime.known_engine import steps

SHORT = ["--sequences", "2", "--anchors", "4", "--dtype", "float32"]


def text(prompt: list[int], answer: list[int]) -> AnsweredPrompt:
    return AnsweredPrompt("1", "a", prompt, answer)


DATA = [text([9, 9, 9, 4], [5, 3, 5, 8]), text([4, 7], [3, 5, 1])]


@pytest.mark.parametrize(
    ("size", "stops", "chosen"),
    [
        # 5 occurs three times in answers, 3 twice, 1 and 8 once.
        (2, [], [3, 5]),
        (3, [], [1, 3, 5]),
        # The stop token is in it though it never occurs; one beyond the vocabulary is none.
        (2, [6, 70], [5, 6]),
        # All of the answers, then 9 of the prompts, which has three, then 4 with two.
        (5, [], [1, 3, 5, 8, 9]),
        (6, [], [1, 3, 4, 5, 8, 9]),
        # Then the others by id.
        (9, [], [0, 1, 2, 3, 4, 5, 7, 8, 9]),
    ],
)
def test_the_most_frequent_tokens_of_answers_are_chosen_then_of_prompts_then_others(
    size: int, stops: list[int], chosen: list[int]
) -> None:
    assert choose_draft_tokens(DATA, size, 10, stops).tolist() == chosen


def test_tokens_of_further_texts_count_as_those_of_prompts_do() -> None:
    # 7 occurs once in a prompt and three times here, 9 three times in a prompt and once here.
    assert choose_draft_tokens(DATA, 5, 10, [], [[7, 7, 7], [9]]).tolist() == [1, 3, 5, 7, 8]
    # What answers have comes first however often.
    assert choose_draft_tokens(DATA, 4, 10, [], [[7] * 50]).tolist() == [1, 3, 5, 8]


def test_the_share_of_answer_tokens_that_can_be_drafted() -> None:
    assert covered(torch.tensor([3, 5]), DATA) == pytest.approx(5 / 7)
    assert covered(torch.tensor([5, 900]), DATA) == pytest.approx(3 / 7)


@pytest.mark.parametrize(("size", "message"), [(0, "at least 1 and"), (10, "less than the model's vocabulary of 10")])
def test_sizes_that_cannot_be(size: int, message: str) -> None:
    with pytest.raises(InputError, match=f"{message}.*not {size}; 8192 is usual"):
        choose_draft_tokens(DATA, size, 10)
    with pytest.raises(InputError, match=r"at least 2 \(the stop tokens\)"):
        choose_draft_tokens(DATA, 1, 10, [1, 2])


@pytest.mark.parametrize(
    ("temperature", "top_k", "choice"), [(1.0, 0, 0.0), (2.0, 0, 0.0), (1.0, 5, 0.0), (1.0, 0, 0.5), (1.0, 0, 1.0)]
)
def test_the_loss_is_kl_over_the_draft_tokens_weighted_by_their_probability(
    base: BaseModel, temperature: float, top_k: int, choice: float
) -> None:
    parts = decoder_parts(base.model)
    tokens = torch.tensor(DRAFT_TOKENS)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, 32, generator=generator)
    drafts = torch.randn(7, 2, 32, generator=generator, requires_grad=True)
    targets = torch.randint(0, 9, (7, 2), generator=generator)
    shifts = torch.randn(7, 2, 32, generator=generator, requires_grad=True)
    objective = Objective((1.0, 0.5), temperature, top_k, choice)
    found = draft_losses(parts, drafts.detach(), states, targets, objective, shifts.detach(), parts.head_of(tokens))

    wanted = parts.head(parts.norm(states)) / temperature
    if top_k:
        wanted = wanted.masked_fill(wanted < wanted.topk(top_k).values[:, -1:], -torch.inf)
    chosen = one_hot(wanted.argmax(-1), wanted.shape[-1])
    among = ((1 - choice) * wanted.softmax(-1) + choice * chosen)[:, tokens]
    mass = among.sum(-1)
    logs = (parts.head(parts.norm(drafts) + shifts)[..., tokens] / temperature).log_softmax(-1)
    restricted = (among / mass.clamp(min=1e-30)[:, None])[targets]
    by_row = kl_div(logs, restricted, reduction="none").sum(-1)
    by_step = (by_row * mass[targets]).mean(0)
    (by_step * torch.tensor([1.0, 0.5])).sum().mul(temperature**2).backward()
    torch.testing.assert_close(found.by_step, by_step.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.gradient, drafts.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.shift_gradient, shifts.grad, rtol=1e-4, atol=1e-6)
    # The same with what is known of the whole head, which is of no use to another objective.
    known = log_normalisers(parts, states)
    assert known.shape == (9,)
    head = parts.head_of(tokens)
    again = draft_losses(parts, drafts.detach(), states, targets, objective, shifts.detach(), head, known)
    torch.testing.assert_close(again.by_step, found.by_step, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again.gradient, found.gradient, rtol=1e-5, atol=1e-7)


def test_a_loss_over_the_frequent_tokens_trains_what_a_draft_head_does_and_drafts_from_the_whole_vocabulary(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, draft_size=40, steps=4)
    told: list[str] = []
    head, _ = fit(base, sequences, settings, tmp_path / "a", QUIET, report=told.append)
    frequent = replace(settings, draft_size=None, loss_size=40)
    whole, _ = fit(base, sequences, frequent, tmp_path / "b", QUIET, report=told.append)
    assert head.draft_size == 40
    assert whole.draft_tokens is None
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, head.state_dict()[name], rtol=0, atol=0)
    assert told[0].startswith("drafts are chosen from 40 tokens, ")
    assert any(line.startswith("the loss runs over 40 tokens, ") for line in told)
    with pytest.raises(InputError, match="of a run with another loss_size"):
        fit(base, sequences, replace(frequent, loss_size=41), tmp_path / "b", QUIET, report=lambda _: None)
    with pytest.raises(InputError, match="leave loss_size 40 out, or draft_size"):
        replace(settings, loss_size=40)


def test_a_feature_cache_runs_the_whole_head_over_the_answers_once(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, draft_size=40, steps=4)
    rows: list[int] = []
    count = base.model.get_output_embeddings().register_forward_hook(
        lambda _, normed, logits: rows.append(logits.numel() // logits.shape[-1])
    )
    cache = tmp_path / "cache"
    try:
        # A cache that was made without a draft head is completed.
        whole = replace(settings, draft_size=None)
        fit(base, sequences, whole, tmp_path / "whole", QUIET, feature_cache=cache, report=lambda _: None)
        assert sum(rows) > 0
        assert not list(cache.glob("normalisers-*"))
        rows.clear()
        cached, _ = fit(base, sequences, settings, tmp_path / "a", QUIET, feature_cache=cache, report=lambda _: None)
        assert sum(rows) == sum(len(one.answer) for one in sequences)
        rows.clear()
        again, _ = fit(base, sequences, settings, tmp_path / "b", QUIET, feature_cache=cache, report=lambda _: None)
        assert not rows
        # Of another temperature they are not the sums.
        softer = replace(settings, loss_temperature=2.0)
        fit(base, sequences, softer, tmp_path / "c", QUIET, feature_cache=cache, report=lambda _: None)
        assert rows
    finally:
        count.remove()
    assert again.digest() == cached.digest()
    without, _ = fit(base, sequences, settings, tmp_path / "d", QUIET, report=lambda _: None)
    for name, tensor in without.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_damaged_normalisers_are_named(base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, base, (3,), sequences[:1], QUIET, normalisers=True)
    save_file({"0": torch.zeros(1)}, tmp_path / "normalisers-00000.safetensors")
    with pytest.raises(InputError, match=r"normalisers-00000\.safetensors is not a valid file of features"):
        cache.context(make_batch(sequences[:1], 2, None, None))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("sizes", [TreeSizes(6, (6, 6, 6)), TreeSizes(6, (4, 2, 1))])
def test_simulated_steps_are_those_of_the_loop(
    base: BaseModel, sequences: list[AnsweredPrompt], sizes: TreeSizes, rank: int
) -> None:
    transfer = random_transfer((3, 1, 3), correction_rank=rank, draft_tokens=DRAFT_TOKENS)
    correction = None
    if transfer.correction:
        correction = correction_tables(base.model, transfer.correction, transfer.draft_tokens)
    engine = ReferenceEngine(HiddenTransferModel(base.model, transfer))
    for one, sequence in zip(predict(base, transfer, sequences), sorted(sequences, key=len), strict=True):
        assert set(one.tokens.flatten().tolist()) <= set(DRAFT_TOKENS)
        simulated = list(advances(one, sizes))
        drafter = Drafter(FixedSizes(sizes), [TransferDrafts(correction)], np.array(DRAFT_TOKENS))
        loop = steps(engine, sequence.prompt, drafter, chunk=64)
        assert next(loop) == sequence.answer[:1]
        assert [len(next(loop)) for _ in simulated] == simulated


def test_tokens_outside_the_head_count_as_not_accepted(base: BaseModel, sequences: list[AnsweredPrompt]) -> None:
    whole, part = (
        evaluate(base, random_transfer((3, 1, 3), draft_tokens=tokens), sequences) for tokens in (None, DRAFT_TOKENS)
    )
    assert part["anchors"] == whole["anchors"]
    texts = list(predict(base, random_transfer((3, 1, 3), draft_tokens=DRAFT_TOKENS), sequences))
    outside = np.concatenate([~np.isin(one.labels, DRAFT_TOKENS) for one in texts])
    hits = np.concatenate([one.hits.any(-1) for one in texts])
    assert outside.any()
    assert not hits[outside].any()


SETTINGS = FitSettings(layers=(2, 3), steps=3, sequences=2, anchors=4, init="identity", correction_rank=4)


def test_a_fit_measures_what_it_trains_and_goes_on_where_it_stopped(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, draft_size=40, schedule="constant")
    told: list[str] = []
    whole, _ = fit(base, sequences, settings, tmp_path / "a", QUIET, report=told.append)
    assert whole.draft_size == 40
    assert set(base.stop_tokens()) <= set(whole.draft_tokens.tolist())  # type: ignore[union-attr]
    assert told[0].startswith("drafts are chosen from 40 tokens, ")
    fit(base, sequences, replace(settings, steps=2), tmp_path / "b", QUIET, report=lambda _: None)
    resumed, _ = fit(base, sequences, settings, tmp_path / "b", QUIET, report=lambda _: None)
    assert resumed.digest() == whole.digest()
    with pytest.raises(InputError, match="of a run with another draft_size"):
        fit(base, sequences, replace(settings, draft_size=41), tmp_path / "b", QUIET, report=lambda _: None)
    # What is trained further keeps its head.
    more, _ = fit(
        base, sequences, replace(SETTINGS, init="file"), tmp_path / "c", QUIET, start=whole, report=lambda _: None
    )
    assert more.draft_tokens.tolist() == whole.draft_tokens.tolist()  # type: ignore[union-attr]


def test_training_lowers_what_is_measured(base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path) -> None:
    settings = replace(SETTINGS, draft_size=60, steps=30, sequences=4, anchors=16, learning_rate=1e-2)
    fitted, _ = fit(base, sequences, settings, tmp_path / "a", QUIET, report=lambda _: None)
    start, _ = fit(
        base, sequences, replace(settings, steps=1, learning_rate=1e-12), tmp_path / "b", QUIET, report=lambda _: None
    )
    before, after = (evaluate(base, one, sequences)["kl"] for one in (start, fitted))
    assert all(later < 0.8 * earlier for earlier, later in zip(before, after, strict=True))


def test_pseudo_rows_cost_less_and_so_does_training(base: BaseModel) -> None:
    whole, part = RowCosts.of(base, 0.1), RowCosts.of(base, 0.1, 66)
    head = whole.head_parameters
    assert part.draft_parameters == head // 4
    assert whole.pseudo_row(4) - part.pseudo_row(4) == pytest.approx(
        (head - head // 4) / (4 * whole.layer_parameters + head)
    )
    sizes = [estimate(base, random_transfer((2,), draft_tokens=tokens), 4, 8, 64).logits for tokens in (None, [1, 2])]
    assert sizes[1] < sizes[0]


def test_the_commands_choose_a_head_and_measure_it(
    tiny_checkpoint: Path,
    tiny_transfer: Path,
    data_folder: Path,
    held_out_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out, identity = str(tiny_checkpoint), tmp_path / "t.safetensors", load_base_model(str(tiny_checkpoint))
    arguments = ["draft-head", model, "--data", str(data_folder), "--size", "50", "--transfer", str(tiny_transfer)]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "drafts are chosen from 50 tokens, " in said
    assert "measure them with ht-train eval --store" in said
    found, about = load_transfer_layers(out, identity.identity())
    before, _ = load_transfer_layers(tiny_transfer)
    assert found.draft_size == about.recipe["draft_head"]["size"] == 50
    assert 0 < about.recipe["draft_head"]["answer_tokens_covered"] <= 1
    assert about.acceptance == {}
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=0)
    # Again, of that file and in its place, measured.
    arguments[-1] = str(out)
    assert cli.main([*arguments, "--out", str(out), "--held-out", str(held_out_folder)]) == 0
    again, about = load_transfer_layers(out)
    assert again.digest() == found.digest()
    assert len(about.acceptance["top"]["1"]) == 3

    # Words that the data does not have.
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "zebra quiz"}) + "\n")
    more = tmp_path / "more.safetensors"
    assert cli.main([*arguments, "--out", str(more), "--prompts", str(prompts)]) == 0
    _, about = load_transfer_layers(more)
    assert about.recipe["draft_head"]["prompts"] == 1

    fitted = tmp_path / "fitted.safetensors"
    places = ["--data", str(data_folder), "--out", str(fitted), "--layers", "2", "--steps", "1"]
    assert cli.main(["fit", model, *places, "--draft-size", "50", *SHORT]) == 0
    transfer, about = load_transfer_layers(fitted)
    assert transfer.draft_tokens is not None
    assert transfer.draft_tokens.tolist() == again.draft_tokens.tolist()  # type: ignore[union-attr]
    assert about.recipe["draft_head"]["size"] == about.recipe["draft_size"] == 50

    places[places.index(str(fitted))] = str(tmp_path / "worded.safetensors")
    assert cli.main(["fit", model, *places, "--draft-size", "50", "--draft-prompts", str(prompts), *SHORT]) == 0
    worded, about = load_transfer_layers(tmp_path / "worded.safetensors")
    assert about.recipe["draft_head"]["prompts"] == 1
    asked, _ = load_transfer_layers(more)
    assert worded.draft_tokens.tolist() == asked.draft_tokens.tolist()  # type: ignore[union-attr]

    places[places.index(str(tmp_path / "worded.safetensors"))] = str(tmp_path / "frequent.safetensors")
    assert cli.main(["fit", model, *places, "--loss-size", "50", "--draft-prompts", str(prompts), *SHORT]) == 0
    frequent, about = load_transfer_layers(tmp_path / "frequent.safetensors")
    assert frequent.draft_tokens is None
    assert about.recipe["loss_size"] == 50
    assert "draft_head" not in about.recipe

    sweep = ["sweep", model, "--data", str(data_folder), "--held-out", str(held_out_folder)]
    options = ["--out", str(tmp_path / "sweep"), "--steps", "2", "--rungs", "1", "--placement", "2,3"]
    assert cli.main([*sweep, *options, "--draft-size", "50", *SHORT]) == 0
    options[1] = str(tmp_path / "frequent")
    assert cli.main([*sweep, *options, "--loss-size", "50", *SHORT]) == 0
    assert "Recommended" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--size", "264"], "less than the model's vocabulary of 264 tokens, not 264"),
        (["--transfer", "nowhere"], "no transfer layers at nowhere"),
        (["--data", "nowhere"], "nowhere is not a data folder"),
        (["--out", "MODEL/model.safetensors"], "--out is there and would be replaced, and "),
    ],
)
def test_what_cannot_be_is_one_line(
    tiny_checkpoint: Path,
    tiny_transfer: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    places = ["--data", str(data_folder), "--transfer", str(tiny_transfer), "--out", str(tmp_path / "t.safetensors")]
    changes = [one.replace("MODEL", str(tiny_checkpoint)) for one in changes]
    assert cli.main(["draft-head", str(tiny_checkpoint), *places, *changes]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "t.safetensors").exists()


def test_words_for_a_draft_head_need_one(
    tiny_checkpoint: Path, data_folder: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--data", str(data_folder), "--out", str(tmp_path / "t.safetensors")]
    assert cli.main(["fit", str(tiny_checkpoint), *places, "--draft-prompts", str(prompts_file)]) == 1
    assert "say how many tokens it has: --draft-size 8192" in capsys.readouterr().err.replace("\n", " ")


def test_further_words_are_drafted_and_a_run_with_others_does_not_continue(
    base: BaseModel, sequences: list[AnsweredPrompt], tmp_path: Path
) -> None:
    used = {token for one in sequences for token in one.tokens} | set(base.stop_tokens())
    first, second = sorted(set(range(base.model.config.vocab_size)) - used)[-2:]
    settings = replace(SETTINGS, draft_size=len(used) + 1, steps=1)
    checkpoint = tmp_path / "a"
    found, _ = fit(base, sequences, settings, checkpoint, QUIET, draft_texts=[[first]], report=lambda _: None)
    assert found.draft_tokens.tolist() == sorted({*used, first})  # type: ignore[union-attr]
    with pytest.raises(InputError, match="of a run with another draft_texts"):
        fit(base, sequences, settings, checkpoint, QUIET, draft_texts=[[second]], report=lambda _: None)
