"""What changes to transfer layers and their loss bring: variants trained side by side, on the same batches.

python docs/measuring/transfer_variants.py MODEL --data FOLDER --held-out FOLDER ... --start FILE --out FOLDER \
    --variants plain,hard,gated --steps 300

The base model runs once for all variants of a step, so that six cost little more than half of six fits. Every variant
begins as the transfer layers of `--start`, with further draft steps by ridge regression, and keeps what it adds at
zero; so all are equal before the first step. A run continues from its checkpoint, and `results.json` in the folder has
the settings and each measurement: accuracy by step given the step before, and tokens per step by tree rows, simulated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from variant_drafts import measure
from variants import VARIANTS, Trained, Training, Variant

from ht_export.bench.conditions import commit
from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.families import HeadRows, decoder_parts
from ht_export.model.tensors import opened_tensors, write_safetensors
from ht_export.model.transfer import TransferLayers, load_transfer_layers
from ht_export.progress import progress_bar
from ht_export.prompts import evenly, read_conversations
from ht_export.training.batches import AnchorBatch, BatchSampler
from ht_export.training.data import AnsweredPrompt, read_data
from ht_export.training.draft_tokens import choose_draft_tokens
from ht_export.training.drafts import Context, draft_hidden, run_context
from ht_export.training.losses import CHUNK_ROWS
from ht_export.training.optimizers import KEPT, make_optimizers
from ht_export.training.start import copy_start, regress
from runtime.files import write_json
from runtime.formats import Format

CHECKPOINTS = Format("safetensors file of variants", 1 << 24, "delete it to start again")


def grown(
    base: BaseModel, start: TransferLayers, steps: int, data: Sequence[AnsweredPrompt], progress: Progress
) -> TransferLayers:
    """Return `start` with as many `steps` as are asked for, further ones by ridge regression on `data`."""
    assert start.correction is not None
    layers = (*start.layers, *(start.layers[0],) * (steps - start.num_steps))
    made = TransferLayers(layers, start.hidden_size, start.correction.rank)
    copy_start(made, start)
    regress(made, start.num_steps, data, 8, lambda batch: run_context(base.model, layers, batch.input_ids), progress)
    return made


def begin(name: str, base: BaseModel, start: TransferLayers, tokens: Tensor) -> Training:
    """Return a variant that begins as `start`, which has as many steps as any."""
    variant = VARIANTS[name]
    assert start.correction is not None
    rank = start.correction.rank
    first = TransferLayers(start.layers[: variant.steps], start.hidden_size, rank)
    taken = {key: value for key, value in start.state_dict().items() if key in first.state_dict()}
    taken["correction.scales"] = taken["correction.scales"][: variant.steps]
    first.load_state_dict(taken)
    transfer = TransferLayers(first.layers, first.hidden_size, max(rank, variant.correction_rank), tokens)
    copy_start(transfer, first)
    transfer.requires_grad_(True)
    trained = Trained(variant, transfer, base)
    assert transfer.correction is not None
    correction = (transfer.correction.inner, transfer.correction.context, transfer.correction.candidates)
    by_muon = (*(transfer.maps if variant.muon else ()), *(correction if variant.muon_correction else ()))
    optimizers = make_optimizers(trained, by_muon, variant.learning_rate)
    return Training(name, trained, optimizers)


@dataclass(frozen=True)
class Wanted:
    """Of a chunk of anchors: the base model's probabilities [U, V_d] of the draft tokens, their sums [U], its own
    choice [U] as a draft token's number, -1 for one outside; `index` [N, K] into these.
    """

    probabilities: Tensor
    mass: Tensor
    choice: Tensor
    index: Tensor


def step_variant(
    training: Training,
    base: BaseModel,
    batch: AnchorBatch,
    context: Context,
    head: HeadRows,
    wanted: Sequence[Wanted],
    done: float,
    steps: int,
) -> list[float]:
    """Take one optimizer step and return the KL by draft step."""
    parts = decoder_parts(base.model)
    trained = training.trained
    variant = trained.variant
    used = batch.weights > 0
    with trained.adapted():
        drafts = draft_hidden(base.model, trained.transfer, context, batch.anchors)[used]
    ids = batch.input_ids.flatten()
    places = positions_of(batch, variant.steps)
    normed = parts.norm(drafts)
    shifts = []
    for k in range(variant.steps):
        before = parts.embed(ids[places[:, k]])
        shifts.append(trained.contexts(k, before, normed[:, k], ids[places[:, k] - 1]))
    assert trained.transfer.correction is not None
    read = normed.float() + trained.transfer.correction.candidates(torch.stack(shifts, 1))
    gradient, by_step = gradients(read.detach(), head, wanted, variant, done)
    roots, grads = [read], [gradient]
    if variant.consistency:
        states = context.hidden[len(parts.layers)].flatten(0, 1)[places]
        distance = 1 - cosine_similarity(normed.float(), parts.norm(states).float(), dim=-1)
        roots.append(variant.consistency * distance.mean(0).sum())
        grads.append(torch.ones(()))
    torch.autograd.backward(roots, grads)
    nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = variant.learning_rate * training.rate(done, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return by_step


def positions_of(batch: AnchorBatch, steps: int) -> Tensor:
    """Return [N, K], where in the flattened batch the token before each draft is."""
    offsets = batch.input_ids.shape[1] * torch.arange(len(batch.anchors))
    found = batch.anchors[..., None] + torch.arange(1, steps + 1) + offsets[:, None, None]
    return found[batch.weights > 0]


@torch.no_grad()
def wanted_of(base: BaseModel, batch: AnchorBatch, context: Context, head: HeadRows, steps: int) -> list[Wanted]:
    """Return what the base model says at the positions of each chunk of anchors."""
    parts = decoder_parts(base.model)
    states = context.hidden[len(parts.layers)].flatten(0, 1)
    places = positions_of(batch, steps)
    chunks = []
    for start in range(0, len(places), CHUNK_ROWS):
        positions, index = torch.unique(places[start : start + CHUNK_ROWS], return_inverse=True)
        normed = parts.norm(states[positions])
        logits = parts.head(normed).float()
        choice = torch.searchsorted(head.tokens, logits.argmax(-1)).clamp_(max=len(head.tokens) - 1)
        choice = torch.where(head.tokens[choice] == logits.argmax(-1), choice, -1)
        probabilities = (logits[:, head.tokens] - logits.logsumexp(-1, keepdim=True)).exp()
        chunks.append(Wanted(probabilities, probabilities.sum(-1), choice, index))
    return chunks


@torch.no_grad()
def gradients(
    read: Tensor, head: HeadRows, wanted: Sequence[Wanted], variant: Variant, done: float
) -> tuple[Tensor, list[float]]:
    """Return the gradient of the loss with respect to what the head reads, [N, K, d], and the KL by step."""
    gradient = torch.zeros_like(read)
    totals = torch.zeros(variant.steps)
    weights = variant.weights or (1.0,) * variant.steps
    for number, chunk in enumerate(wanted):
        rows = slice(number * CHUNK_ROWS, number * CHUNK_ROWS + len(chunk.index))
        for k in range(variant.steps):
            index = chunk.index[:, k]
            target, mass = chunk.probabilities[index], chunk.mass[index]
            logs = head(read[rows, k].to(head.weight.dtype)).float().log_softmax(-1)
            totals[k] += (torch.special.xlogy(target, target) - target * logs).sum() - torch.special.xlogy(
                mass, mass
            ).sum()
            drafted = logs.exp_()
            if done >= variant.acceptance:
                error = acceptance_gradient(drafted, target)
            else:
                if variant.hard:
                    choice = chunk.choice[index]
                    inside = (choice >= 0).float()
                    target = target * (1 - variant.hard)
                    target[torch.arange(len(choice)), choice.clamp(min=0)] += variant.hard * inside
                    mass = mass * (1 - variant.hard) + variant.hard * inside
                error = drafted.mul_(mass[:, None]).sub_(target)
            error.mul_(weights[k] / len(read))
            gradient[rows, k] = (error.to(head.weight.dtype) @ head.weight).float() * head.factor
    return gradient, (totals / len(read)).tolist()


def acceptance_gradient(drafted: Tensor, target: Tensor) -> Tensor:
    """Return the gradient with respect to logits of -log(sum of min(draft, base)), rows [N, V_d] of probabilities."""
    accepted = torch.minimum(drafted, target).sum(-1, keepdim=True).clamp_(min=1e-4)
    below = (drafted < target).float() * drafted
    return -(below - drafted * below.sum(-1, keepdim=True)) / accepted


def save(path: Path, step: int, trainings: Sequence[Training]) -> None:
    """Write a checkpoint."""
    tensors = {}
    for training in trainings:
        for key, value in training.trained.state_dict().items():
            tensors[f"{training.name}/weight/{key}"] = value.contiguous()
        names = {id(p): key for key, p in training.trained.named_parameters()}
        for optimizer in training.optimizers:
            for parameter, kept in optimizer.state.items():
                for key, value in kept.items():
                    tensors[f"{training.name}/optimizer/{names[id(parameter)]}/{key}"] = value
    write_safetensors(path, tensors, {"step": str(step)})


def load(path: Path, trainings: Sequence[Training]) -> int:
    """Read a checkpoint and return its step."""
    with opened_tensors(path, CHECKPOINTS) as file:
        for training in trainings:
            weights = {key: file.get_tensor(f"{training.name}/weight/{key}") for key in training.trained.state_dict()}
            training.trained.load_state_dict(weights)
            names = {id(p): key for key, p in training.trained.named_parameters()}
            for optimizer in training.optimizers:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        prefix = f"{training.name}/optimizer/{names[id(parameter)]}"
                        kept = {key: file.get_tensor(f"{prefix}/{key}") for key in KEPT[type(optimizer)]}
                        optimizer.state[parameter] = kept
        return int((file.metadata() or {})["step"])


def main() -> None:
    """Train and measure the variants that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="a data folder of prompts of other kinds")
    parser.add_argument("--max-texts", type=int, default=5000, help="of --data, evenly")
    parser.add_argument("--apart", type=int, default=100, help="texts of --data that are kept apart and measured too")
    parser.add_argument("--texts", type=int, default=70, help="of --held-out, evenly")
    parser.add_argument("--draft-prompts", type=Path, help="words for a draft head")
    parser.add_argument("--draft-size", type=int, default=16384)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", default="plain", help=", ".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--anchors", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the base model's run")
    parser.add_argument("--checkpoint-every", type=int, default=10)
    options = parser.parse_args()
    names = options.variants.split(",")
    torch.manual_seed(0)
    base = load_base_model(options.model, getattr(torch, options.dtype))
    most = max(VARIANTS[name].steps for name in names)
    everything = [text for folder in options.data for text in read_data(folder, base, most + 1)]
    everything = evenly(everything, options.max_texts)
    apart = evenly(everything, options.apart)
    kept = {id(text) for text in apart}
    data = [text for text in everything if id(text) not in kept]
    held_out = read_data(options.held_out, base, most + 1)
    held_out = evenly(held_out, options.texts)
    start, _ = load_transfer_layers(options.start, base.identity())
    words: list[list[int]] = []
    if options.draft_prompts:
        said = [one.turns[0] for one in read_conversations(options.draft_prompts)]
        words = base.tokenizer(said, add_special_tokens=False)["input_ids"]
    tokens = choose_draft_tokens(data, options.draft_size, base.model.config.vocab_size, base.stop_tokens(), words)
    head = decoder_parts(base.model).head_of(tokens)
    with progress_bar() as progress:
        longest = grown(base, start, max(most, start.num_steps), data, progress)
    trainings = [begin(name, base, longest, tokens) for name in names]
    checkpoint, results = options.out / "checkpoint.safetensors", options.out / "results.json"
    settings = {key: str(value) for key, value in vars(options).items() if not isinstance(value, (list, Path))}
    record: dict[str, Any] = {
        "command": sys.argv,
        "commit": commit(),
        "settings": settings,
        "variants": {name: asdict(VARIANTS[name]) for name in names},
        "texts": len(data),
        "measured": [],
        "losses": [],
    }
    step = 0
    if checkpoint.is_file():
        record = json.loads(results.read_text())
        step = load(checkpoint, trainings)
        print(f"continuing at step {step}", file=sys.stderr)
    sampler = BatchSampler(data, options.sequences, options.anchors, most, 0)
    with progress_bar() as progress:
        bar = progress.add_task("fitting", total=options.steps, completed=step)

        def note() -> None:
            found: dict[str, Any] = {
                "step": step,
                "held_out": measure(trainings, base, held_out, head, progress),
                "apart": measure(trainings, base, apart, head, progress),
            }
            record["measured"].append(found)
            for name, one in found["held_out"].items():
                print(step, name, one["tokens_per_step"], one["top"]["1"], found["apart"][name]["tokens_per_step"])

        if not step and not record["measured"]:
            note()
        while step < options.steps:
            begun = perf_counter()
            batch = sampler.batch(step)
            context = run_context(base.model, start.layers, batch.input_ids)
            wanted = wanted_of(base, batch, context, head, most)
            shared = perf_counter() - begun
            losses, seconds = {}, {"shared": round(shared, 2)}
            for training in trainings:
                begun = perf_counter()
                done = step / options.steps
                losses[training.name] = step_variant(training, base, batch, context, head, wanted, done, options.steps)
                seconds[training.name] = round(perf_counter() - begun, 2)
            step += 1
            progress.update(bar, completed=step)
            record["losses"].append({"step": step, "kl": losses, "seconds": seconds})
            if step % options.checkpoint_every == 0 or step == options.steps:
                if step == options.steps or step % 100 == 0:
                    note()
                save(checkpoint, step, trainings)
                write_json(results, record)
                recent = record["losses"][-options.checkpoint_every :]
                mean = {n: np.mean([r["kl"][n][0] for r in recent]).round(3) for n in names}
                print(step, mean, seconds, flush=True)


if __name__ == "__main__":
    main()
