"""Disk space and memory that an export needs, checked before the work."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ht_export.quantize.formats import Storage
from runtime.errors import InputError

# Disk space needed, as a multiple of the weights and besides them.
SPACE_FACTOR = 1.05
SPACE_CONSTANT = 64 << 20
# Memory needed besides the loaded model, per value of the largest matrix, which is converted as a whole, and for
# everything else.
MEMORY_PER_VALUE = 12
MEMORY_CONSTANT = 1 << 30
# Memory needed per byte of quantised weights, which ONNX Runtime arranges anew when it runs the engine.
ARRANGED = 1.3


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights: of the `graph` that is traced and checked, `quantised`, 0 where they are not, and
    `prepared` for that, 0 where they need not be.
    """

    graph: int
    quantised: int = 0
    prepared: int = 0

    @property
    def engine(self) -> int:
        """Bytes of the weights of the engine that is made of the graph."""
        return self.quantised or self.graph


def weight_bytes(
    model: PreTrainedModel, dtype: torch.dtype, storage: Storage | None, *, as_stored: bool, draft_size: int = 0
) -> WeightBytes:
    """Return what the weights of the base model `model` take: in `dtype`, or with `as_stored` as the checkpoint has
    them where that is less, and then quantised if there is a `storage`; with `draft_size` rows of its head once more.
    """

    def size(parameter: Tensor) -> int:
        return min(parameter.dtype.itemsize, dtype.itemsize) if as_stored else dtype.itemsize

    parameters = list(model.parameters())
    head = model.get_output_embeddings().weight
    drafts = draft_size * head.shape[1]
    graph = sum(parameter.numel() * size(parameter) for parameter in parameters) + drafts * size(head)
    if storage is None:
        return WeightBytes(graph)
    embedding = model.get_input_embeddings().weight
    quantised = drafts + sum(parameter.numel() for parameter in parameters if parameter is not embedding)
    if head is embedding:
        # A tied head gets weights of its own, which are quantised.
        quantised += embedding.numel()
    # They are rotated, and then a tied head has weights of its own there too.
    prepared = graph + (embedding.numel() * size(embedding) if head is embedding else 0) if storage.rounds_rows else 0
    return WeightBytes(graph, embedding.numel() * dtype.itemsize + int(quantised * storage.bits / 8), prepared)


def check_space(weights: WeightBytes, out: Path) -> None:
    """Raise `InputError` unless there is room beside `out` for these weights and what goes with them: for those of the
    graph, and until the engine is written for the prepared ones or the quantised ones too.
    """
    # Prepared ones take the place of those of the graph.
    both = max(weights.graph + weights.prepared, (weights.prepared or weights.graph) + weights.quantised)
    needed = int(SPACE_FACTOR * both) + SPACE_CONSTANT
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise InputError(
            f"{out.parent} has {free / 2**20:.0f} MiB free, and the export needs about {needed / 2**20:.0f} MiB; "
            "free some space or choose another folder"
        )


def check_memory(model: PreTrainedModel, arranged: int) -> None:
    """Raise `InputError` unless there is memory to export the base model `model`, and to run an engine that has
    `arranged` bytes of weights arranged anew for that.
    """
    largest = max(parameter.numel() for parameter in model.parameters())
    needed = max(MEMORY_PER_VALUE * largest, int(ARRANGED * arranged)) + MEMORY_CONSTANT
    free = psutil.virtual_memory().available
    if free < needed:
        raise InputError(
            f"the export needs about {needed >> 20} MiB of memory besides the model, and {free >> 20} MiB are free; "
            "close other programs, or export on a larger machine"
        )
