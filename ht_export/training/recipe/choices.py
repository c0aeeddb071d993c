"""Defaults that follow the model and the machine: placement, draft head, precisions, and batches that fit in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from msgspec import Meta

from ht_export.model.checkpoint import BaseModel
from ht_export.model.transfer import LARGEST_SIZE, MOST_STEPS, TransferLayers, default_layers
from ht_export.training.memory import estimate, free_memory
from runtime.bindings import MOST_VOCABULARY
from runtime.checks import MOST_REPEATS

# Draft steps where rows cost much, and where they are nearly free.
CPU_STEPS, GPU_STEPS = 3, 4
# A draft head pays where the model's own is so large a part of it, and much larger than the draft head.
HEAD_SHARE = 0.25
DRAFT_SIZE = 16_384
# Weights of a model from which on an engine in float32 is slow, and large.
LARGE_MODEL = 1_000_000_000
SEQUENCES, ANCHORS = 8, 64
LEAST_ANCHORS = 16
# Of the memory that is free; the rest is for what the estimate does not see.
MEMORY_SHARE = 0.6

Size = Annotated[int, Meta(ge=0, le=LARGEST_SIZE)]


@dataclass(frozen=True)
class Choices:
    """What a run was begun with, as the options of the stages' commands have it. `draft_size` None is no draft head,
    `loss_size` None a loss over all tokens that are drafted.
    """

    layers: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=MOST_STEPS)]
    draft_size: Annotated[int, Meta(ge=1, le=MOST_VOCABULARY)] | None
    precision: Literal["fp32", "int8"]
    dtype: Literal["float32", "bfloat16"]
    sequences: Annotated[int, Meta(ge=1, le=MOST_REPEATS)]
    anchors: Annotated[int, Meta(ge=1, le=MOST_REPEATS)]
    accumulate: Annotated[int, Meta(ge=1, le=MOST_REPEATS)]
    # Earlier releases did not say it.
    loss_size: Annotated[int, Meta(ge=1, le=MOST_VOCABULARY)] | None = None

    @property
    def head_size(self) -> int | None:
        """How many tokens the loss runs over, None for all."""
        return self.loss_size or self.draft_size


def layers_of(base: BaseModel, steps: int | None, device: str) -> tuple[int, ...]:
    """Return where the draft steps join by default: two thirds of the depth."""
    return default_layers(base.model.config.num_hidden_layers, steps or (GPU_STEPS if device == "cuda" else CPU_STEPS))


def draft_size_of(base: BaseModel) -> int | None:
    """Return the size of the draft head that pays for this model, None where none does."""
    head = base.model.get_output_embeddings().weight.numel()
    all_weights = sum(parameter.numel() for parameter in base.model.parameters())
    large = head >= HEAD_SHARE * all_weights and base.model.config.vocab_size >= 2 * DRAFT_SIZE
    return DRAFT_SIZE if large else None


def loss_size_of(base: BaseModel, draft_size: int | None) -> int | None:
    """Return how many tokens the loss runs over where drafts come from the whole vocabulary, None for all: what is
    learned from the most frequent ones serves the others, as vectors of all of them are projections of the head.
    """
    return DRAFT_SIZE if draft_size is None and base.model.config.vocab_size >= 2 * DRAFT_SIZE else None


def precision_of(base: BaseModel) -> Literal["fp32", "int8"]:
    """Return the precision of the engine that answers the prompts."""
    weights = sum(parameter.numel() for parameter in base.model.parameters())
    return "int8" if weights >= LARGE_MODEL else "fp32"


def within_memory(base: BaseModel, choices: Choices, correction_rank: int, longest: int) -> Choices:
    """Return `choices` with fewer sequences at once, and more batches a step, until the memory is there for texts of
    up to `longest` tokens; then with fewer anchors. What is left of too little memory is for `fit` to refuse.
    """
    head = None if choices.head_size is None else torch.arange(choices.head_size)
    transfer = TransferLayers(choices.layers, base.model.config.hidden_size, correction_rank, head)
    room = MEMORY_SHARE * free_memory(base.model.device)

    def fits(one: Choices) -> bool:
        return estimate(base, transfer, one.sequences, one.anchors, longest).total <= room

    found = choices
    while not fits(found) and found.sequences > 1:
        found = replace(found, sequences=-(-found.sequences // 2), accumulate=2 * found.accumulate)
    while not fits(found) and found.anchors > LEAST_ANCHORS:
        found = replace(found, anchors=found.anchors // 2, accumulate=2 * found.accumulate)
    return found
