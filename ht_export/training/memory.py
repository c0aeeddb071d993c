"""Memory of a training run: estimated before it starts, and the peak when it is over."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass

import psutil
import torch

from ht_export.model.checkpoint import BaseModel
from ht_export.model.families import head_dim
from ht_export.model.transfer import TransferLayers
from ht_export.training.losses import CHUNK_ROWS
from runtime.errors import InputError
from runtime.memory import container_bytes

MEBIBYTE = 1 << 20
# Allocators hold on to more than is in use.
SLACK = 1.25


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training step needs besides the loaded base model, by what they are for."""

    optimizer: int
    context: int
    drafts: int
    logits: int

    @property
    def total(self) -> int:
        """All of them, with what allocators hold on to."""
        return int(SLACK * (self.optimizer + self.context + self.drafts + self.logits))

    def check(self, device: torch.device) -> None:
        """Raise `InputError` when the device has less memory free than this."""
        free = free_memory(device)
        if self.total > free:
            parts = ", ".join(f"{name} {size // MEBIBYTE}" for name, size in asdict(self).items())
            raise InputError(
                f"a training step needs about {self.total // MEBIBYTE} MiB more memory ({parts}) and "
                f"{free // MEBIBYTE} MiB are free on {device.type}; lower --sequences or --anchors and raise "
                "--accumulate by the same factor"
            )


def estimate(base: BaseModel, transfer: TransferLayers, sequences: int, anchors: int, longest: int) -> MemoryEstimate:
    """Return what a step over `sequences` texts of at most `longest` tokens with `anchors` anchors each needs."""
    config = base.model.config
    size = base.model.dtype.itemsize
    heads, num_steps = config.num_attention_heads, transfer.num_steps
    key_value = 2 * config.num_key_value_heads * head_dim(config)
    passed = config.num_hidden_layers - min(transfer.layers)
    kept_states = len(set(transfer.layers)) + 1
    working = 6 * config.hidden_size + 3 * config.intermediate_size
    context = sequences * longest * size * (kept_states * config.hidden_size + passed * key_value + working)
    rows = sequences * anchors * num_steps
    seen = longest + anchors * num_steps
    # Backward keeps of a layer, for each row: its inputs, norms, projections, MLP parts and attention output.
    per_layer = 10 * config.hidden_size + 4 * config.intermediate_size + 4 * heads * head_dim(config)
    # Keys and values of the text are kept again beside those of the pseudo rows, and the mask once for all layers.
    drafts = size * passed * (rows * per_layer + 2 * sequences * seen * key_value)
    drafts += rows * seen * (1 + size) + 2 * rows * config.hidden_size * 4
    if base.model.device.type == "cuda":
        # With a mask and grouped heads attention writes its scores out there, and keeps them.
        drafts += 2 * size * heads * rows * seen * max(1, passed)
        context += 2 * size * heads * sequences * longest * longest
    # A chunk has up to K base rows for each draft row: output, float32, softmax and entropy of the first; output, its
    # gradient, float32 and target of the second. A draft head is a copy of rows of the base model's, and what is kept
    # of the softmax.
    width = transfer.draft_size or config.vocab_size
    chunk = CHUNK_ROWS * (config.vocab_size * num_steps * (size + 12) + width * (2 * size + 8))
    chunk += transfer.draft_size * (size * config.hidden_size + 12 * num_steps * CHUNK_ROWS)
    # Gradients and AdamW's two moments.
    optimizer = 12 * sum(parameter.numel() for parameter in transfer.parameters())
    return MemoryEstimate(optimizer, context, drafts, chunk)


def free_memory(device: torch.device) -> int:
    """Return the bytes free on `device`, within the limits that a container sets."""
    if device.type == "cuda":
        # Memory that PyTorch holds for later would otherwise count as used.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    room = container_bytes()
    available = int(psutil.virtual_memory().available)
    return available if room is None else min(available, room)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has used on `device`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
