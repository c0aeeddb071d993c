"""Held-out acceptance: what the drafts of trained transfer layers are worth on text that they never saw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from ht_export.model.checkpoint import BaseModel
from ht_export.model.correction import correction_tables
from ht_export.model.families import DecoderParts, HeadRows, decoder_parts
from ht_export.model.reference import draft_head, normed_drafts
from ht_export.model.transfer import TransferLayers
from ht_export.training.batches import make_batch
from ht_export.training.data import AnsweredPrompt
from ht_export.training.drafts import draft_hidden, run_context
from ht_export.training.losses import CHUNK_ROWS
from ht_export.training.simulate import TextDrafts, tokens_per_step
from runtime.drafting.correction import SHORTLIST, CorrectedDrafts, TokenCorrection
from runtime.drafting.drafts import DraftStep
from runtime.tree import TreeSizes

TOP = (1, 2, 4, 8)
# Ranks whose acceptance is told one by one; also what "the steps before were right" means.
RANKS = 16
TREE_ROWS = (2, 4, 8, 16, 32, 64)
BIN_EDGES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class TextPredictions(TextDrafts):
    """The drafts at every anchor of one text, and what is counted about them.

    kl [A, K] in nats, as `ht_export.training.losses` has it; hits [A, K, SHORTLIST], whether the text's token has rank
    1, 2, ... in the draft as corrected for the token before it, with the `predicted` probability of each;
    uncorrected_hits [A, K, SHORTLIST] without.
    """

    task: str
    kl: NDArray[np.float32]
    hits: NDArray[np.bool_]
    predicted: NDArray[np.float64]

    @property
    def uncorrected_hits(self) -> NDArray[np.bool_]:
        """See the class."""
        return self.tokens == self.labels[:, :, None]


def evaluate(
    base: BaseModel,
    transfer: TransferLayers,
    data: Sequence[AnsweredPrompt],
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
    data: Sequence[AnsweredPrompt],
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Iterator[TextPredictions]:
    """Yield the drafts at every anchor of every text, the shortest text first."""
    parts = decoder_parts(base.model)
    device = base.model.device
    ordered = sorted(data, key=len)
    correction = None
    if transfer.correction:
        correction = correction_tables(base.model, transfer.correction, transfer.draft_tokens)
    read_by = draft_head(base.model, transfer)
    starts = range(0, len(ordered), batch_size)
    bar = progress.add_task("evaluating", total=len(starts)) if progress else None
    for start in starts:
        sequences = ordered[start : start + batch_size]
        batch = make_batch(sequences, transfer.num_steps, None, None).to(device)
        context = run_context(base.model, transfer.layers, batch.input_ids)
        hidden = draft_hidden(base.model, transfer, context, batch.anchors)
        normed = normed_drafts(base.model, transfer, hidden)
        for row, sequence in enumerate(sequences):
            used = batch.weights[row] > 0
            anchors = batch.anchors[row][used]
            states = context.hidden[len(parts.layers)][row]
            yield _text_predictions(parts, sequence, normed[row][used], states, anchors, correction, read_by)
        if progress and bar is not None:
            progress.advance(bar)


def statistics(texts: Sequence[TextPredictions], sizes: TreeSizes | None = None) -> dict[str, Any]:
    """Return what the predictions say, as JSON values.

    - `anchors`: positions counted; `top`: per n, the share of positions whose token is in the draft's first n, by
      step; `kl`: mean KL from the base model's distribution, in nats, by step. With a token correction both are of
      drafts corrected for the text's own token before, which at step 1 is certain and at later steps means: given that
      the step before was right. `top_uncorrected` knows nothing of the tokens in between.
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
    parts: DecoderParts,
    sequence: AnsweredPrompt,
    normed: Tensor,
    states: Tensor,
    anchors: Tensor,
    correction: TokenCorrection | None,
    read_by: HeadRows | None,
) -> TextPredictions:
    """Return the predictions of one text from normed states [A, K, d] of its drafts, which a draft head reads or the
    base model's, and states [N, d] of its own rows.
    """
    text = np.array(sequence.tokens)
    positions = anchors.cpu().numpy()
    num_steps = normed.shape[1]
    steps = torch.arange(num_steps, device=anchors.device)
    head = parts.head if read_by is None else read_by
    tables = None
    if correction is not None:
        tables = [torch.from_numpy(table).to(normed.device) for table in (correction.contexts, correction.candidates)]
        if read_by is not None:
            tables[1] = tables[1][read_by.tokens]
        scales = torch.from_numpy(correction.scales).to(normed.device)
        ids = torch.from_numpy(text).to(normed.device)
    chunks: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(anchors), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        before_rows = anchors[rows, None] + steps + 1
        targets, index = torch.unique(before_rows, return_inverse=True)
        wanted = parts.capped(parts.head(parts.norm(states[targets]))).float().log_softmax(-1)
        if read_by is not None:
            wanted = wanted[:, read_by.tokens]
            mass = wanted.exp().sum(-1)
        by_step = []
        for k in range(num_steps):
            logs = head(normed[rows, k]).float().log_softmax(-1)
            best = logs.topk(min(SHORTLIST, logs.shape[-1]), dim=-1)
            if tables is not None:
                contexts = tables[0][ids[before_rows[:, k]]] * scales[k]
                logs = (logs + contexts @ tables[1].T).log_softmax(-1)
            base_logs = wanted[index[:, k]]
            kl = (base_logs.exp() * (base_logs - logs)).sum(-1)
            if read_by is not None:
                kl -= torch.special.xlogy(mass, mass)[index[:, k]]
            found = best.indices if read_by is None else read_by.tokens[best.indices]
            by_step.append((found.cpu(), best.values.exp().cpu(), kl.cpu()))
        indices, values, divergences = zip(*by_step, strict=True)
        chunks.append((torch.stack(indices, 1), torch.stack(values, 1), torch.stack(divergences, 1)))
    tokens, probabilities, kl_by_step = (torch.cat(found).numpy() for found in zip(*chunks, strict=True))
    labels = text[positions[:, None] + np.arange(num_steps) + 2]
    before = text[positions[:, None] + np.arange(num_steps) + 1]
    probabilities = probabilities.astype(np.float64)
    ranked, predicted = _corrected(tokens, probabilities, before, correction)
    return TextPredictions(
        tokens=tokens,
        probabilities=probabilities,
        labels=labels,
        certain=before[:, 0],
        correction=correction,
        task=sequence.task,
        kl=kl_by_step,
        hits=ranked == labels[:, :, None],
        predicted=predicted,
    )


def _corrected(
    tokens: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    before: NDArray[np.int64],
    correction: TokenCorrection | None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return tokens and probabilities [A, K, N] in the order that they have after the tokens `before` [A, K]."""
    if correction is None:
        return tokens, probabilities
    ranked, predicted = np.empty_like(tokens), np.empty_like(probabilities)
    for anchor in range(len(tokens)):
        steps = [DraftStep(*step) for step in zip(tokens[anchor], probabilities[anchor], strict=True)]
        drafts = CorrectedDrafts(steps, correction, tokens.shape[2])
        for k in range(tokens.shape[1]):
            step = drafts.after(k, int(before[anchor, k]))
            ranked[anchor, k], predicted[anchor, k] = step.tokens, step.probabilities
    return ranked, predicted


def _everywhere(rows: int, texts: Sequence[TextPredictions]) -> TreeSizes:
    return TreeSizes(rows, (rows,) * texts[0].num_steps)


def _shares(texts: Sequence[TextPredictions]) -> dict[str, Any]:
    kl = np.concatenate([text.kl for text in texts]).mean(0)
    found = {
        "anchors": sum(len(text.labels) for text in texts),
        "top": _top(np.concatenate([text.hits for text in texts])),
        "kl": [round(float(value), 4) for value in kl],
    }
    if texts[0].correction is not None:
        found["top_uncorrected"] = _top(np.concatenate([text.uncorrected_hits for text in texts]))
    return found


def _top(hits: NDArray[np.bool_]) -> dict[str, list[float]]:
    return {str(n): [round(float(share), 4) for share in hits[:, :, :n].any(-1).mean(0)] for n in TOP}


def _conditional(texts: Sequence[TextPredictions]) -> dict[str, Any]:
    hits = np.concatenate([text.hits for text in texts])[:, :, :RANKS]
    probabilities = np.concatenate([text.predicted for text in texts])[:, :, :RANKS]
    right_so_far = np.ones(len(hits), dtype=bool)
    ranks, reliability = [], []
    for k in range(hits.shape[1]):
        step_hits = hits[right_so_far, k]
        shares = step_hits.mean(0) if len(step_hits) else np.zeros(hits.shape[2])
        ranks.append([round(float(share), 4) for share in shares])
        reliability.append(_reliability(probabilities[right_so_far, k].ravel(), step_hits.ravel()))
        right_so_far &= hits[:, k].any(-1)
    return {"ranks": ranks, "calibration": reliability}


def _reliability(predicted: NDArray[np.float64], right: NDArray[np.bool_]) -> dict[str, Any]:
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
