"""Held-out acceptance: what the drafts of trained transfer layers are worth on text that they never saw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from ht_export.attention import use_attention_rows
from ht_export.checkpoint import BaseModel
from ht_export.families import DecoderParts, decoder_parts
from ht_export.training.batches import make_batch
from ht_export.training.data import Sequence
from ht_export.training.drafts import draft_hidden, run_context
from ht_export.training.losses import CHUNK_ROWS
from ht_export.training.simulate import TextDrafts, tokens_per_step
from ht_export.transfer import TransferLayers
from runtime.tree import TreeSizes

TOP = (1, 2, 4, 8)
# How many candidates of a draft are kept; trees of 64 nodes hardly ever take a later one.
CANDIDATES = 32
# Ranks whose acceptance is told one by one; also what "the steps before were right" means.
RANKS = 16
TREE_ROWS = (2, 4, 8, 16, 32, 64)
BIN_EDGES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class TextPredictions(TextDrafts):
    """The drafts at every anchor of one text, with kl [A, K], the KL of each from the base model in nats."""

    task: str
    kl: NDArray[np.float32]


def evaluate(
    base: BaseModel,
    transfer: TransferLayers,
    data: SequenceOf[Sequence],
    sizes: TreeSizes | None = None,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the acceptance statistics of `transfer` on `data`, the base model's own text; every position counts.

    See `statistics`. `sizes` are those of the decoding pass to simulate besides the general ones.
    """
    return statistics(list(predict(base, transfer, data, batch_size, progress)), sizes)


@torch.inference_mode()
def predict(
    base: BaseModel,
    transfer: TransferLayers,
    data: SequenceOf[Sequence],
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Iterator[TextPredictions]:
    """Yield the drafts at every anchor of every text, the shortest text first."""
    use_attention_rows(base.model)
    parts = decoder_parts(base.model)
    device = base.model.device
    ordered = sorted(data, key=len)
    starts = range(0, len(ordered), batch_size)
    bar = progress.add_task("evaluating", total=len(starts)) if progress else None
    for start in starts:
        sequences = ordered[start : start + batch_size]
        batch = make_batch(sequences, transfer.num_steps, None, None).to(device)
        context = run_context(base.model, transfer, batch.input_ids)
        hidden = draft_hidden(base.model, transfer, context, batch.anchors)
        for row, sequence in enumerate(sequences):
            used = batch.weights[row] > 0
            anchors = batch.anchors[row][used]
            yield _text_predictions(parts, sequence, hidden[row][used], context.hidden[len(parts.layers)][row], anchors)
        if progress and bar is not None:
            progress.advance(bar)


def statistics(texts: SequenceOf[TextPredictions], sizes: TreeSizes | None = None) -> dict[str, Any]:
    """Return what the predictions say, as JSON values.

    - `anchors`: positions counted; `top`: per n, the share of positions whose token is in the draft's first n, by
      step; `kl`: mean KL from the base model's distribution, in nats, by step.
    - `ranks`: by step, the share of positions whose token has rank 1, 2, ..., given that the tokens of the steps before
      had one of these ranks. `calibration`: by step, under the same condition, candidates in bins of their draft
      probability, each with `count`, mean `predicted` and `observed` share of right ones; and their `error` (ECE).
    - `tokens_per_step`: simulated exactly, best-first trees of so many rows with pseudo rows on every node; under
      `sizes` for those sizes. Plain decoding has 1.00.
    - `tasks`: anchors, top and tokens_per_step (16 rows) of each task.
    """
    by_task: dict[str, list[TextPredictions]] = defaultdict(list)
    for text in texts:
        by_task[text.task].append(text)
    found: dict[str, Any] = {**_shares(texts), **_conditional(texts)}
    found["tokens_per_step"] = {
        str(rows): round(tokens_per_step(texts, _everywhere(rows, texts)), 4) for rows in TREE_ROWS
    }
    if sizes is not None:
        found["sizes"] = {
            "tree_rows": sizes.tree_rows,
            "pseudo_rows": list(sizes.pseudo_rows),
            "tokens_per_step": round(tokens_per_step(texts, sizes), 4),
        }
    found["tasks"] = {
        task: {**_shares(own), "tokens_per_step": {"16": round(tokens_per_step(own, _everywhere(16, own)), 4)}}
        for task, own in sorted(by_task.items())
    }
    return found


def _text_predictions(
    parts: DecoderParts, sequence: Sequence, hidden: Tensor, states: Tensor, anchors: Tensor
) -> TextPredictions:
    """Return the predictions of one text from hidden [A, K, d] of its drafts and states [N, d] of its own rows."""
    num_steps = hidden.shape[1]
    steps = torch.arange(num_steps, device=anchors.device)
    tokens, probabilities, kl = [], [], []
    for start in range(0, len(anchors), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        targets, index = torch.unique(anchors[rows, None] + steps + 1, return_inverse=True)
        wanted = parts.head(parts.norm(states[targets])).float().log_softmax(-1)
        chunk_tokens, chunk_probabilities, chunk_kl = [], [], []
        for k in range(num_steps):
            logs = parts.head(parts.norm(hidden[rows, k])).float().log_softmax(-1)
            best = logs.topk(min(CANDIDATES, logs.shape[-1]), dim=-1)
            chunk_tokens.append(best.indices)
            chunk_probabilities.append(best.values.exp())
            base_logs = wanted[index[:, k]]
            chunk_kl.append((base_logs.exp() * (base_logs - logs)).sum(-1))
        tokens.append(torch.stack(chunk_tokens, 1).cpu())
        probabilities.append(torch.stack(chunk_probabilities, 1).cpu())
        kl.append(torch.stack(chunk_kl, 1).cpu())
    text = np.array(sequence.tokens)
    positions = anchors.cpu().numpy()
    return TextPredictions(
        tokens=torch.cat(tokens).numpy(),
        probabilities=torch.cat(probabilities).numpy().astype(np.float64),
        labels=text[positions[:, None] + np.arange(num_steps) + 2],
        task=sequence.task,
        kl=torch.cat(kl).numpy(),
    )


def _everywhere(rows: int, texts: SequenceOf[TextPredictions]) -> TreeSizes:
    return TreeSizes(rows, (rows,) * texts[0].num_steps)


def _shares(texts: SequenceOf[TextPredictions]) -> dict[str, Any]:
    hits = np.concatenate([text.hits for text in texts])
    top = {str(n): [round(float(share), 4) for share in hits[:, :, :n].any(-1).mean(0)] for n in TOP}
    kl = np.concatenate([text.kl for text in texts]).mean(0)
    return {"anchors": len(hits), "top": top, "kl": [round(float(value), 4) for value in kl]}


def _conditional(texts: SequenceOf[TextPredictions]) -> dict[str, Any]:
    hits = np.concatenate([text.hits for text in texts])[:, :, :RANKS]
    probabilities = np.concatenate([text.probabilities for text in texts])[:, :, :RANKS]
    right_so_far = np.ones(len(hits), dtype=bool)
    ranks, calibration = [], []
    for k in range(hits.shape[1]):
        step_hits = hits[right_so_far, k]
        shares = step_hits.mean(0) if len(step_hits) else np.zeros(hits.shape[2])
        ranks.append([round(float(share), 4) for share in shares])
        calibration.append(_calibration(probabilities[right_so_far, k].ravel(), step_hits.ravel()))
        right_so_far &= hits[:, k].any(-1)
    return {"ranks": ranks, "calibration": calibration}


def _calibration(predicted: NDArray[np.float64], right: NDArray[np.bool_]) -> dict[str, Any]:
    bins = np.digitize(predicted, BIN_EDGES[1:-1])
    table = []
    error = 0.0
    for number in range(len(BIN_EDGES) - 1):
        chosen = bins == number
        if not (count := int(chosen.sum())):
            continue
        mean, observed = float(predicted[chosen].mean()), float(right[chosen].mean())
        error += count / len(predicted) * abs(mean - observed)
        table.append({"count": count, "predicted": round(mean, 4), "observed": round(observed, 4)})
    return {"error": round(error, 4), "bins": table}


def headline(found: dict[str, Any]) -> str:
    """Return top-1/2/4/8 of each step in one line."""
    by_step: Iterable[tuple[float, ...]] = zip(*(found["top"][str(n)] for n in TOP), strict=True)
    return ", ".join("/".join(f"{value:.2f}" for value in values) for values in by_step)
