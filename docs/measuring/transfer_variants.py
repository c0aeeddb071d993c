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
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear

from ht_export.bench.conditions import commit
from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.families import HeadRows, decoder_parts
from ht_export.model.tensors import opened_tensors, write_safetensors
from ht_export.model.transfer import TransferLayers, load_transfer_layers
from ht_export.progress import progress_bar
from ht_export.prompts import read_conversations
from ht_export.training.batches import AnchorBatch, BatchSampler, make_batch
from ht_export.training.data import AnsweredPrompt, read_data
from ht_export.training.draft_tokens import choose_draft_tokens
from ht_export.training.drafts import Context, draft_hidden, run_context
from ht_export.training.losses import CHUNK_ROWS
from ht_export.training.ridge import RidgeRegression
from runtime.arrays import FloatArray
from runtime.drafting.best_first import best_first_tree
from runtime.drafting.correction import LARGEST_CORRECTION, SHORTLIST
from runtime.drafting.drafts import DraftStep
from runtime.files import write_json
from runtime.formats import Format
from runtime.tree import Tree

ROWS = (8, 16, 32)
CHECKPOINTS = Format("safetensors file of variants", 1 << 24, "delete it to start again")
RIDGE_TEXTS = 256


@dataclass(frozen=True)
class Variant:
    """What is changed. `steps` draft steps; `weights` of the steps' losses; `hard`, the share of the base model's own
    choice in the target; `acceptance`, from which share of the fit on the loss is the acceptance of LK losses
    (arXiv 2602.23881) instead of KL; `consistency`, the weight of the distance to the real states; `gated`, a
    correction scaled by the pseudo state; `two_before`, one that knows two tokens; `rank` of adapters beside all
    products of the layers passed (with `rank_of` those named so alone); `muon` in place of AdamW for matrices.
    """

    steps: int = 4
    weights: tuple[float, ...] = ()
    hard: float = 0.0
    acceptance: float = 1.0
    consistency: float = 0.0
    gated: bool = False
    two_before: bool = False
    rank: int = 0
    rank_of: str = ""
    muon: bool = False
    learning_rate: float = 1e-3
    correction_rank: int = 0


VARIANTS = {
    "plain": Variant(),
    "three": Variant(steps=3),
    "five": Variant(steps=5),
    "hard": Variant(hard=0.5),
    "hardest": Variant(hard=1.0),
    "gated": Variant(gated=True),
    "two-before": Variant(two_before=True),
    "both": Variant(gated=True, two_before=True),
    "adapters-8": Variant(rank=8),
    "adapters-16": Variant(rank=16),
    "adapters-32": Variant(rank=32),
    "adapters-down": Variant(rank=32, rank_of="down_proj"),
    "consistent": Variant(consistency=0.5),
    "acceptance": Variant(acceptance=0.5),
    "weighted": Variant(weights=(1.0, 0.8, 0.6, 0.4)),
    "muon": Variant(muon=True),
    "slow": Variant(learning_rate=5e-4),
    "fast": Variant(learning_rate=2e-3),
}


class Trained(nn.Module):
    """A variant's parameters."""

    def __init__(self, variant: Variant, transfer: TransferLayers, base: BaseModel) -> None:
        super().__init__()
        self.variant = variant
        self.transfer = transfer
        assert transfer.correction is not None
        width, rank = transfer.hidden_size, transfer.correction.rank
        self.gate = nn.Linear(width, rank) if variant.gated else None
        self.second = nn.Embedding(base.model.config.vocab_size, rank) if variant.two_before else None
        for zero in (self.gate, self.second):
            if zero is not None:
                for parameter in zero.parameters():
                    nn.init.zeros_(parameter)
        self.adapters = nn.ModuleDict()
        for index, layer in enumerate(decoder_parts(base.model).layers):
            for name, module in layer.named_modules():
                passed = index >= min(transfer.layers) and isinstance(module, nn.Linear)
                if variant.rank and passed and variant.rank_of in name:
                    self.adapters[f"{index}.{name}".replace(".", "-")] = Adapter(module, variant.rank)

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Have the adapters in the base model's layers meanwhile."""
        adapters = [one for one in self.adapters.values() if isinstance(one, Adapter)]
        for adapter in adapters:
            adapter.on = True
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.on = False

    def contexts(self, step: int, embeddings: Tensor, normed: Tensor, second: Tensor) -> Tensor:
        """Return [N, r], what candidates are multiplied by at `step`, for embeddings [N, d] of the tokens before, the
        normed drafts [N, d] and the tokens [N] before those.
        """
        correction = self.transfer.correction
        assert correction is not None
        found = correction.contexts(embeddings) * correction.scales[step]
        if self.gate is not None:
            found = found * (1 + self.gate(normed.float()))
        if self.second is not None:
            found = found + self.second(second)
        return found


class Adapter(nn.Module):
    """A low-rank product beside a linear layer, begun as zero, that adds to its output while it is `on`."""

    def __init__(self, beside: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, beside.in_features) / math.sqrt(beside.in_features))
        self.up = nn.Parameter(torch.zeros(beside.out_features, rank))
        self.on = False
        beside.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return output + linear(linear(inputs[0], self.down), self.up) if self.on else None


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal (Muon, Keller Jordan 2024), for matrices."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                kept = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                kept.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(kept, group["momentum"]))
                scale = 0.2 * math.sqrt(max(parameter.shape))
                parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about the nearest orthogonal matrix, by five Newton-Schulz steps."""
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.shape[0] > x.shape[1]
    x = x.T if wide else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if wide else x


@dataclass
class Training:
    """A variant under way."""

    name: str
    trained: Trained
    optimizers: list[torch.optim.Optimizer]

    def rate(self, done: float, steps: int) -> float:
        """Return the learning rate's share after `done` of the steps."""
        warm = min(1.0, (done * steps + 1) / 20)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def begin(name: str, base: BaseModel, start: TransferLayers, ridge: TransferLayers, tokens: Tensor) -> Training:
    """Return a variant that begins as `start`, with steps that this lacks from `ridge`."""
    variant = VARIANTS[name]
    assert start.correction is not None
    transfer = TransferLayers((start.layers[0],) * variant.steps, start.hidden_size, start.correction.rank, tokens)
    weights = transfer.state_dict()
    for key, value in start.state_dict().items():
        if key == "correction.scales":
            last = value[-1:].expand(max(0, variant.steps - len(value)), -1)
            weights[key] = torch.cat([value, last])[: variant.steps]
        elif not key.startswith("maps.") or int(key.split(".")[1]) < variant.steps:
            weights[key] = value
    for key, value in ridge.state_dict().items():
        if key.startswith("maps.") and start.num_steps <= int(key.split(".")[1]) < variant.steps:
            weights[key] = value
    transfer.load_state_dict(weights)
    transfer.requires_grad_(True)
    trained = Trained(variant, transfer, base)
    parameters = list(trained.parameters())
    matrices = [p for p in transfer.maps.parameters() if p.dim() == 2] if variant.muon else []
    ours = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in ours]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=variant.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=variant.learning_rate))
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
    read = normed + trained.transfer.correction.candidates(torch.stack(shifts, 1))
    gradient, by_step = gradients(read.detach(), head, wanted, variant, done)
    roots, grads = [read], [gradient]
    if variant.consistency:
        states = context.hidden[len(parts.layers)].flatten(0, 1)[places]
        distance = 1 - cosine_similarity(normed, parts.norm(states), dim=-1)
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
            logs = head(read[rows, k]).float().log_softmax(-1)
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
            gradient[rows, k] = error.mul_(weights[k] / len(read)) @ head.weight * head.factor
    return gradient, (totals / len(read)).tolist()


def acceptance_gradient(drafted: Tensor, target: Tensor) -> Tensor:
    """Return the gradient with respect to logits of -log(sum of min(draft, base)), rows [N, V_d] of probabilities."""
    accepted = torch.minimum(drafted, target).sum(-1, keepdim=True).clamp_(min=1e-4)
    below = (drafted < target).float() * drafted
    return -(below - drafted * below.sum(-1, keepdim=True)) / accepted


@dataclass(frozen=True)
class PathDrafts:
    """Drafts at one anchor, corrected by a variant: shortlists of tokens [K, N] with probabilities [K, N], candidates
    [V, r] and contexts [V, r] tables, and for each step what the context is multiplied by and what is added, [K, r].
    """

    tokens: NDArray[np.int64]
    probabilities: FloatArray
    candidates: NDArray[np.float32]
    contexts: NDArray[np.float32]
    scales: NDArray[np.float32]
    added: NDArray[np.float32]
    known: dict[tuple[int, int], DraftStep]

    def __len__(self) -> int:
        return len(self.tokens)

    def after(self, step: int, token: int) -> DraftStep:
        """Return the candidates of `step` after `token`."""
        if (found := self.known.get((step, token))) is None:
            tokens, probabilities = self.tokens[step], self.probabilities[step]
            context = self.contexts[token] * self.scales[step] + self.added[step]
            shift = np.clip(self.candidates[tokens] @ context, -LARGEST_CORRECTION, LARGEST_CORRECTION)
            weights = np.exp(shift.astype(np.float64)) * probabilities
            order = (-weights).argsort(kind="stable")[: max(ROWS)]
            rest = max(0.0, 1.0 - float(probabilities.sum()))
            found = DraftStep(tokens[order], weights[order] / (float(weights.sum()) + rest))
            self.known[step, token] = found
        return found


@torch.inference_mode()
def measure(
    trainings: Sequence[Training], base: BaseModel, texts: Sequence[AnsweredPrompt], head: HeadRows, progress: Progress
) -> dict[str, Any]:
    """Return what the variants' drafts are worth on `texts`, by name."""
    parts = decoder_parts(base.model)
    most = max(training.trained.variant.steps for training in trainings)
    counts = {training.name: Counts(training.trained.variant.steps) for training in trainings}
    tables = {training.name: tables_of(training, base, head) for training in trainings}
    bar = progress.add_task("measuring", total=len(texts))
    for text in texts:
        batch = make_batch([text], most, None, None)
        context = run_context(base.model, trainings[0].trained.transfer.layers, batch.input_ids)
        anchors = batch.anchors[0]
        ids = np.array(text.tokens)
        for training in trainings:
            trained, steps = training.trained, training.trained.variant.steps
            with trained.adapted():
                drafts = draft_hidden(base.model, trained.transfer, context, batch.anchors)[0]
            normed = parts.norm(drafts)
            best = head(normed).float().softmax(-1).topk(SHORTLIST, dim=-1)
            found = [best.values.double().numpy(), head.tokens[best.indices].numpy()]
            scales, added = per_path(trained, normed, torch.from_numpy(ids), anchors)
            at = [
                PathDrafts(found[1][i], found[0][i], *tables[training.name], scales[i], added[i], {})
                for i in range(len(anchors))
            ]
            labels = ids[anchors.numpy()[:, None] + np.arange(steps) + 2]
            before = ids[anchors.numpy()[:, None] + np.arange(steps) + 1]
            counts[training.name].add(at, labels, before)
        progress.advance(bar)
    progress.remove_task(bar)
    return {name: count.found() for name, count in counts.items()}


def tables_of(training: Training, base: BaseModel, head: HeadRows) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return candidates and contexts, [V, r] each."""
    parts = decoder_parts(base.model)
    correction = training.trained.transfer.correction
    assert correction is not None
    ids = torch.arange(base.model.config.vocab_size)
    contexts = torch.cat([correction.contexts(parts.embed(part)) for part in ids.split(4096)])
    drafted = head(correction.candidates.weight.T.float()).T
    candidates = torch.zeros(len(ids), drafted.shape[1])
    candidates[head.tokens] = drafted - drafted.mean(0)
    return candidates.numpy(), contexts.numpy()


def per_path(trained: Trained, normed: Tensor, ids: Tensor, anchors: Tensor) -> tuple[FloatArray, FloatArray]:
    """Return [A, K, r] that contexts are multiplied by, and [A, K, r] that is added to them, on the text's own path."""
    correction = trained.transfer.correction
    assert correction is not None
    scales = correction.scales.expand(len(normed), -1, -1)
    if trained.gate is not None:
        scales = scales * (1 + trained.gate(normed.float()))
    added = torch.zeros_like(scales)
    if trained.second is not None:
        added = trained.second(ids[anchors[:, None] + torch.arange(normed.shape[1])])
    return scales.numpy(), added.numpy()


class Counts:
    """What is counted over texts."""

    def __init__(self, steps: int) -> None:
        self.hits: dict[int, NDArray[np.float64]] = {n: np.zeros(steps) for n in (1, 2, 4, 8)}
        self.anchors = 0
        self.log_loss = np.zeros(steps)
        self.passes = dict.fromkeys(ROWS, 0)
        self.tokens = dict.fromkeys(ROWS, 0)

    def add(self, at: Sequence[PathDrafts], labels: NDArray[np.int64], before: NDArray[np.int64]) -> None:
        """Take in one text."""
        for drafts, label, token in zip(at, labels, before, strict=True):
            self.anchors += 1
            for k in range(len(drafts)):
                step = drafts.after(k, int(token[k]))
                rank = np.flatnonzero(step.tokens == label[k])
                place = int(rank[0]) if len(rank) else SHORTLIST
                for n, hits in self.hits.items():
                    hits[k] += place < n
                self.log_loss[k] -= math.log(max(1e-4, float(step.probabilities[place]) if len(rank) else 0.0))
        for rows in ROWS:
            position = 0
            while position < len(labels):
                tree = best_first_tree(int(before[position][0]), at[position], rows)
                accepted = followed(tree, labels[position])
                self.passes[rows] += 1
                self.tokens[rows] += accepted + 1
                position += accepted + 1

    def found(self) -> dict[str, Any]:
        """Return what was counted."""
        return {
            "anchors": self.anchors,
            "top": {str(n): [round(v, 4) for v in (hits / self.anchors).tolist()] for n, hits in self.hits.items()},
            "log_loss": [round(v, 4) for v in (self.log_loss / self.anchors).tolist()],
            "tokens_per_step": {str(rows): round(self.tokens[rows] / self.passes[rows], 4) for rows in ROWS},
        }


def followed(tree: Tree, labels: NDArray[np.int64]) -> int:
    """Return how many of `labels` the tree has from its root on."""
    node = 0
    for accepted, label in enumerate(labels.tolist()):
        child = tree.child(node, label)
        if child is None:
            return accepted
        node = child
    return len(labels)


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
                adam = isinstance(optimizer, torch.optim.AdamW)
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        keys = ("step", "exp_avg", "exp_avg_sq") if adam else ("exp_avg",)
                        prefix = f"{training.name}/optimizer/{names[id(parameter)]}"
                        optimizer.state[parameter] = {key: file.get_tensor(f"{prefix}/{key}") for key in keys}
        return int((file.metadata() or {})["step"])


def ridge_of(base: BaseModel, start: TransferLayers, steps: int, data: Sequence[AnsweredPrompt]) -> TransferLayers:
    """Return maps by regression for `steps` draft steps at the layer of the start's first."""
    made = TransferLayers((start.layers[0],) * steps, start.hidden_size)
    regression = RidgeRegression(made)
    texts = sorted(data[:: math.ceil(len(data) / RIDGE_TEXTS)], key=len)
    for first in range(0, len(texts), 8):
        chosen = texts[first : first + 8]
        batch = make_batch(chosen, steps, None, None)
        regression.add(run_context(base.model, made.layers, batch.input_ids), map(len, chosen))
    regression.solve()
    return made


def main() -> None:
    """Train and measure the variants that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="a data folder of prompts of other kinds")
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
    parser.add_argument("--checkpoint-every", type=int, default=10)
    options = parser.parse_args()
    names = options.variants.split(",")
    torch.manual_seed(0)
    base = load_base_model(options.model, torch.float32)
    most = max(VARIANTS[name].steps for name in names)
    everything = [text for folder in options.data for text in read_data(folder, base, most + 1)]
    apart = everything[:: max(1, len(everything) // options.apart)][: options.apart] if options.apart else []
    kept = {id(text) for text in apart}
    data = [text for text in everything if id(text) not in kept]
    held_out = read_data(options.held_out, base, most + 1)
    held_out = held_out[:: max(1, math.ceil(len(held_out) / options.texts))]
    start, _ = load_transfer_layers(options.start, base.identity())
    words: list[list[int]] = []
    if options.draft_prompts:
        said = [one.turns[0] for one in read_conversations(options.draft_prompts)]
        words = base.tokenizer(said, add_special_tokens=False)["input_ids"]
    tokens = choose_draft_tokens(data, options.draft_size, base.model.config.vocab_size, base.stop_tokens(), words)
    head = decoder_parts(base.model).head_of(tokens)
    ridge = ridge_of(base, start, most, data)
    trainings = [begin(name, base, start, ridge, tokens) for name in names]
    checkpoint, results = options.out / "checkpoint.safetensors", options.out / "results.json"
    settings = {key: str(value) for key, value in vars(options).items()}
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
