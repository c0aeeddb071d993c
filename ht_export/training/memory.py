"""Memory of a training run: estimated before it starts, and the peak when it is over."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import psutil
import torch

from ht_export.checkpoint import BaseModel
from ht_export.training.losses import CHUNK_ROWS
from ht_export.transfer import TransferLayers
from runtime.errors import InputError

MEBIBYTE = 1 << 20
# The interpreter and its libraries.
PROGRAM_BYTES = 700 * MEBIBYTE
# Allocators hold on to more than is in use.
SLACK = 1.25


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training step needs at most, by what they are for."""

    weights: int
    context: int
    drafts: int
    logits: int
    program: int = PROGRAM_BYTES

    @property
    def total(self) -> int:
        """All of them."""
        return int(self.weights + self.program + SLACK * (self.context + self.drafts + self.logits))

    def check(self, device: torch.device) -> None:
        """Raise `InputError` when the device has less memory free than this. The weights are already loaded."""
        needed = int(SLACK * (self.context + self.drafts + self.logits))
        free = free_memory(device)
        if needed > free:
            raise InputError(
                f"a training step needs about {needed // MEBIBYTE} MiB more memory (context "
                f"{self.context // MEBIBYTE}, drafts {self.drafts // MEBIBYTE}, logits {self.logits // MEBIBYTE}) and "
                f"{free // MEBIBYTE} MiB are free on {device.type}; lower --sequences or --anchors and raise "
                "--accumulate by the same factor"
            )


def estimate(base: BaseModel, transfer: TransferLayers, sequences: int, anchors: int, longest: int) -> MemoryEstimate:
    """Return what a step over `sequences` texts of at most `longest` tokens with `anchors` anchors each needs."""
    config = base.model.config
    size = base.model.dtype.itemsize
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    optimizer = 4 * 4 * sum(p.numel() for p in transfer.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_value = 2 * config.num_key_value_heads * head_dim
    passed = config.num_hidden_layers - min(transfer.layers)
    kept_states = len(set(transfer.layers)) + 1
    tokens = sequences * longest
    working = 6 * config.hidden_size + 3 * config.intermediate_size
    context = tokens * size * (kept_states * config.hidden_size + passed * key_value + working)
    rows = sequences * anchors * transfer.num_steps
    # What backward keeps of a layer for each row: its inputs, norms, projections, MLP parts and attention output.
    per_layer = 10 * config.hidden_size + 4 * config.intermediate_size + 4 * config.num_attention_heads * head_dim
    # Keys and values of the text are kept again beside those of the pseudo rows, and the mask once for all layers.
    seen = sequences * (longest + anchors * transfer.num_steps) * key_value
    mask = sequences * anchors * transfer.num_steps * (longest + anchors * transfer.num_steps) * (1 + size)
    drafts = size * passed * (rows * per_layer + 2 * seen) + mask + 2 * rows * config.hidden_size * 4
    # Base probabilities and two copies of the drafts' in float32, and the head's own output and its gradient.
    chunk = CHUNK_ROWS * config.vocab_size * (4 * (2 + transfer.num_steps) + 3 * size)
    return MemoryEstimate(weights + optimizer, context, drafts, chunk)


def free_memory(device: torch.device) -> int:
    """Return the bytes free on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has used on `device`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
