"""The weights that a fit begins with: transfer layers trained before, ridge regression, or both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from rich.progress import Progress

from ht_export.model.transfer import TransferLayers
from ht_export.training.batches import AnchorBatch, make_batch
from ht_export.training.data import AnsweredPrompt
from ht_export.training.drafts import Context
from ht_export.training.ridge import RidgeRegression
from runtime.errors import InputError

# Texts of the initial regression; more do not change its outcome noticeably.
RIDGE_TEXTS = 512


def copy_start(transfer: TransferLayers, start: TransferLayers | None) -> None:
    """Make the first steps of `transfer` those of `start`, with its correction; further steps are scaled as the last.

    The maps of further steps stay as they are, and so does what a correction of greater rank has beyond that of
    `start`, which adds nothing yet. Raises `InputError` unless `transfer` begins with all steps of `start` and has its
    rank at least.
    """
    if start is None:
        raise InputError('init "file" needs transfer layers to start from')
    if start.drafter != transfer.drafter:
        raise InputError(
            f"--start has drafter {start.drafter!r}, and {transfer.drafter!r} is asked for; leave --drafter out to "
            "take that of the file"
        )
    own, given = (
        (layers.hidden_size, layers.correction.rank if layers.correction else 0) for layers in (transfer, start)
    )
    if own[0] != given[0] or own[1] < given[1] or transfer.layers[: start.num_steps] != start.layers:
        raise InputError(
            f"the transfer layers to start from have layers, width and correction rank {(start.layers, *given)}, and "
            f"{(transfer.layers, *own)} are asked for; leave those options out to take theirs, or name theirs and "
            "further layers behind them to train more draft steps, and no lower rank"
        )
    taken = dict(start.state_dict())
    if "correction.scales" in taken:
        scales = taken["correction.scales"]
        more = transfer.num_steps - start.num_steps
        taken["correction.scales"] = torch.cat([scales, scales[-1:].expand(more, -1)])
    state = transfer.state_dict()
    for key, value in taken.items():
        state[key][tuple(slice(size) for size in value.shape)] = value
    transfer.load_state_dict(state)


def regress(
    transfer: TransferLayers,
    first_step: int,
    data: Sequence[AnsweredPrompt],
    sequences: int,
    context: Callable[[AnchorBatch], Context],
    progress: Progress,
) -> None:
    """Set the maps of the steps from `first_step` (0-based) on by ridge regression over some of `data`.

    `context` runs the base model over a batch of `sequences` texts. Raises `InputError` where the data is too little.
    """
    if first_step >= transfer.num_steps:
        return
    texts = data[:: math.ceil(len(data) / RIDGE_TEXTS)]
    regression = RidgeRegression(transfer, first_step)
    starts = range(0, len(texts), sequences)
    bar = progress.add_task("regression", total=len(starts))
    ordered = sorted(texts, key=len)
    for start in starts:
        chosen = ordered[start : start + sequences]
        regression.add(context(make_batch(chosen, transfer.num_steps, None, None)), map(len, chosen))
        progress.advance(bar)
    regression.solve()
