"""What the drafts of variants are worth on text, for `transfer_variants.py`: accuracy, and tokens per step of trees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor
from variants import Trained, Training

from ht_export.model.checkpoint import BaseModel
from ht_export.model.families import HeadRows, decoder_parts
from ht_export.training.batches import make_batch
from ht_export.training.data import AnsweredPrompt
from ht_export.training.drafts import draft_hidden, run_context
from runtime.arrays import FloatArray
from runtime.drafting.best_first import best_first_tree
from runtime.drafting.correction import LARGEST_CORRECTION, SHORTLIST
from runtime.drafting.drafts import DraftStep
from runtime.tree import Tree

ROWS = (8, 16, 32)


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
    drafted = head(correction.candidates.weight.T.to(head.weight.dtype)).T.float()
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
