"""Held-out acceptance: how often the base model's greedy token is among the draft's most probable ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from rich.progress import Progress

from ht_export.checkpoint import BaseModel
from ht_export.families import decoder_parts
from ht_export.training.batches import make_batch
from ht_export.training.data import Sequence
from ht_export.training.drafts import draft_hidden, run_context
from ht_export.transfer import TransferLayers

TOP = (1, 2, 4, 8)


@torch.inference_mode()
def evaluate(
    base: BaseModel,
    transfer: TransferLayers,
    data: SequenceOf[Sequence],
    batch_size: int = 4,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the share of positions whose greedy token is in the draft's top 1/2/4/8, per step, overall and per task.

    The result is `{"anchors": n, "top": {"1": [step 1, ..., step K], ...}, "tasks": {task: {...}}}`; `data` is the
    base model's own greedy text, every position of every answer is counted.
    """
    parts = decoder_parts(base.model)
    ordered = sorted(data, key=lambda sequence: len(sequence.prompt) + len(sequence.answer))
    hits: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(len(TOP), transfer.num_steps))
    counts: dict[str, int] = defaultdict(int)
    starts = range(0, len(ordered), batch_size)
    task_bar = progress.add_task("evaluating", total=len(starts)) if progress else None
    for start in starts:
        sequences = ordered[start : start + batch_size]
        batch = make_batch(sequences, transfer.num_steps, None, None)
        context = run_context(base.model, transfer, batch.input_ids)
        hidden = draft_hidden(base.model, transfer, context, batch.anchors)
        for row, sequence in enumerate(sequences):
            anchors = batch.anchors[row][batch.weights[row] > 0]
            ranked = parts.head(parts.norm(hidden[row, : len(anchors)])).topk(max(TOP), dim=-1).indices
            steps = torch.arange(transfer.num_steps)
            labels = batch.input_ids[row][anchors[:, None] + steps + 2]
            found = ranked == labels[..., None]
            hits[sequence.task] += torch.stack([found[..., :top].any(-1).sum(0) for top in TOP])
            counts[sequence.task] += len(anchors)
        if progress and task_bar is not None:
            progress.advance(task_bar)
    tasks = {name: {"anchors": counts[name], "top": _shares(hits[name], counts[name])} for name in sorted(counts)}
    total = sum(counts.values())
    overall = _shares(torch.stack(list(hits.values())).sum(0), total)
    return {"anchors": total, "top": overall, "tasks": tasks}


def _shares(hits: torch.Tensor, count: int) -> dict[str, list[float]]:
    return {str(top): [round(v, 4) for v in (hits[i] / count).tolist()] for i, top in enumerate(TOP)}
