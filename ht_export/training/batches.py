"""Batches of self-distillation text with random anchors, a pure function of (seed, step): resuming needs no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ht_export.training.data import AnsweredPrompt

BUCKET_BATCHES = 16


@dataclass(frozen=True)
class AnchorBatch:
    """input_ids [B, N] padded on the right with 0; anchors [B, A]; weights [B, A], 0 where an anchor is padding."""

    input_ids: Tensor
    anchors: Tensor
    weights: Tensor
    sequences: tuple[AnsweredPrompt, ...]

    def to(self, device: torch.device) -> AnchorBatch:
        """Return this batch on `device`."""
        return AnchorBatch(self.input_ids.to(device), self.anchors.to(device), self.weights.to(device), self.sequences)


class BatchSampler:
    """Shuffled passes over the data; texts of similar length share a batch, so that little of it is padding."""

    def __init__(self, data: Sequence[AnsweredPrompt], sequences: int, anchors: int, num_steps: int, seed: int) -> None:
        self.data = data
        self.sequences = min(sequences, len(data))
        self.anchors = anchors
        self.num_steps = num_steps
        self.seed = seed
        self.batches_per_pass = len(data) // self.sequences
        self._pass: tuple[int, list[int]] = (-1, [])

    def batch(self, number: int) -> AnchorBatch:
        """Return the batch `number` (from 0) of an endless row of batches."""
        pass_index, index = divmod(number, self.batches_per_pass)
        if self._pass[0] != pass_index:
            self._pass = pass_index, self._order(pass_index)
        order = self._pass[1]
        chosen = [self.data[i] for i in order[index * self.sequences : (index + 1) * self.sequences]]
        rng = np.random.default_rng([self.seed, 1, number])
        return make_batch(chosen, self.num_steps, self.anchors, rng)

    def _order(self, pass_index: int) -> list[int]:
        rng = np.random.default_rng([self.seed, 0, pass_index])
        shuffled = rng.permutation(len(self.data))[: self.batches_per_pass * self.sequences]
        batches: list[np.ndarray] = []
        bucket = BUCKET_BATCHES * self.sequences
        for start in range(0, len(shuffled), bucket):
            part = sorted(shuffled[start : start + bucket], key=lambda i: len(self.data[i]))
            batches += [np.array(part[i : i + self.sequences]) for i in range(0, len(part), self.sequences)]
        return [int(i) for b in rng.permutation(len(batches)) for i in batches[b]]


def make_batch(
    sequences: Sequence[AnsweredPrompt], num_steps: int, max_anchors: int | None, rng: np.random.Generator | None
) -> AnchorBatch:
    """Pad `sequences` into one batch with at most `max_anchors` anchors each, drawn from `rng` (all when None).

    An anchor's K drafted tokens all lie within the answer, so that each has a label.
    """
    chosen = []
    for sequence in sequences:
        first = len(sequence.prompt) - 1
        positions = np.arange(first, len(sequence) - 1 - num_steps)
        if max_anchors is not None and rng is not None and len(positions) > max_anchors:
            positions = np.sort(rng.choice(positions, max_anchors, replace=False))
        chosen.append(positions)
    width = max(map(len, sequences))
    count = max(map(len, chosen))
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    anchors = np.zeros((len(sequences), count), dtype=np.int64)
    weights = np.zeros((len(sequences), count), dtype=np.float32)
    for row, (sequence, positions) in enumerate(zip(sequences, chosen, strict=True)):
        input_ids[row, : len(sequence)] = sequence.tokens
        anchors[row, : len(positions)] = positions
        weights[row, : len(positions)] = 1
    return AnchorBatch(
        torch.from_numpy(input_ids), torch.from_numpy(anchors), torch.from_numpy(weights), tuple(sequences)
    )
