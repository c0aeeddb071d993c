"""The blocks that self-speculative decoding (arXiv 2309.08168) drafts best without, searched on the model's own text.

The base model's greedy text is known, so one run without some blocks tells at every position whether the draft would
have been right, and how sure it was; from that follow, for any number of drafted tokens and any confidence to stop at,
the passes that decoding takes. What a pass costs is taken from what it reads: weights. So the search is the same on
every machine, and is an estimate: drafts after a wrong one go on as the text does, and the run's keys and values are
those of the draft, where decoding has the whole model's behind certain tokens.

The paper searches by Bayesian optimisation over some hundred to thousand sets. Here, with a budget of evaluations: each
block alone; then sets that grow by the block that costs least, as found alone; then random changes of the best set.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ht_export.model.blocks import MOST_DRAFTED, Blocks
from ht_export.model.checkpoint import BaseModel
from ht_export.model.families import decoder_parts
from ht_export.model.skipping import all_blocks, block_weights, without
from ht_export.training.batches import make_batch
from ht_export.training.data import AnsweredPrompt
from ht_export.training.drafts import run_context
from runtime.checks import number, whole
from runtime.errors import InputError

# Tokens drafted in a row, and confidences to stop at, that are tried for every set.
DRAFTED = (1, 2, 3, 4, 5, 6, 8, 10, 12)
CONFIDENCES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Sets that grow end after so many that brought nothing.
PATIENCE = 6
MOST_BUDGET = 1 << 20
# Blocks of a random change.
CHANGED = (1, 1, 2, 3)

Block = tuple[str, int]


@dataclass(frozen=True)
class SearchSettings:
    """A search of `budget` evaluations, drawn by `seed`. A drafted token adds `row_cost` of a plain pass to the pass
    that verifies it. `draft_tokens` and `confidence` None are those that are best for a set.
    """

    budget: int = 240
    row_cost: float = 0.05
    seed: int = 0
    draft_tokens: int | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        whole("--budget", self.budget, 1, MOST_BUDGET)
        whole("--seed", self.seed, 0)
        if not 0 <= self.row_cost < math.inf:
            raise InputError(f"--row-cost must be at least 0, not {self.row_cost}")
        if self.draft_tokens is not None:
            whole("--draft-tokens", self.draft_tokens, 1, MOST_DRAFTED)
        if self.confidence is not None:
            number("--confidence", self.confidence, 0, 1)

    @property
    def drafted(self) -> tuple[int, ...]:
        """The numbers of tokens in a row that are tried for every set."""
        return DRAFTED if self.draft_tokens is None else (self.draft_tokens,)

    @property
    def confidences(self) -> tuple[float, ...]:
        """The confidences to stop at that are tried for every set."""
        return CONFIDENCES if self.confidence is None else (self.confidence,)


@dataclass(frozen=True)
class Sight:
    """What the draft says along one text: at each token of the answer, whether it is the draft's first, and how
    probable the draft's first is.
    """

    right: NDArray[np.bool_]
    sure: NDArray[np.float32]


@dataclass(frozen=True)
class Found:
    """A set of blocks and how far to draft without them: `speedup` over plain decoding, as estimated, of
    `tokens_per_step`, with drafts that cost `draft_cost` of a plain pass each; `agreement` of draft and text.
    """

    blocks: Blocks
    draft_tokens: int
    confidence: float
    speedup: float
    tokens_per_step: float
    agreement: float
    draft_cost: float

    def described(self) -> dict[str, Any]:
        """Return the figures, without the blocks, as JSON values."""
        figures = {name: value for name, value in asdict(self).items() if name != "blocks"}
        return {name: round(value, 4) for name, value in figures.items()}


def search(
    base: BaseModel,
    data: Sequence[AnsweredPrompt],
    settings: SearchSettings,
    tell: Callable[[int, Found], None] = lambda count, best: None,
    known: Mapping[frozenset[Block], Found] = MappingProxyType({}),
    keep: Callable[[Found], None] = lambda found: None,
) -> tuple[Found, int]:
    """Return the best set found on `data`, and how many were evaluated; `tell` is called after each with their number
    and the best so far.

    Sets that are `known`, of the same data and settings but for budget and seed, are not evaluated again, and count as
    if they were; `keep` is called with each other one.
    """
    weights = block_weights(base.model)
    blocks = all_blocks(base.model.config.num_hidden_layers)
    seen: dict[frozenset[Block], Found] = {}

    def evaluated(chosen: frozenset[Block]) -> Found | None:
        """Return what a set is worth; None where it is none, or the budget is used up."""
        if chosen not in seen:
            found = Blocks.of(sorted(chosen))
            if not chosen or len(found.attention) == base.model.config.num_hidden_layers:
                return None
            if len(seen) == settings.budget:
                return None
            if chosen in known:
                seen[chosen] = known[chosen]
            else:
                seen[chosen] = evaluate_blocks(base, data, found, draft_cost(base, weights, chosen), settings)
                keep(seen[chosen])
            tell(len(seen), max(seen.values(), key=lambda one: one.speedup))
        return seen[chosen]

    alone = {block: found for block in blocks if (found := evaluated(frozenset([block])))}
    # What is lost for what is saved.
    order = sorted(alone, key=lambda block: (1 - alone[block].agreement) / weights[block])
    best = _grown(order, evaluated)
    drawn = random.Random(settings.seed)
    # Once all sets were seen no change is new.
    for _ in range(settings.budget * len(CHANGED)):
        if len(seen) == settings.budget:
            break
        changed = best ^ frozenset(drawn.sample(blocks, min(drawn.choice(CHANGED), len(blocks))))
        found = evaluated(changed)
        if found is not None and found.speedup > seen[best].speedup:
            best = changed
    return max(seen.values(), key=lambda one: one.speedup), len(seen)


def _grown(order: Sequence[Block], evaluated: Callable[[frozenset[Block]], Found | None]) -> frozenset[Block]:
    """Return the best of the sets that grow in this order."""
    best = grown = frozenset(order[:1])
    highest, idle = -math.inf, 0
    for block in order:
        grown = grown | {block}
        found = evaluated(grown)
        if found is None:
            continue
        if found.speedup > highest:
            best, highest, idle = grown, found.speedup, 0
        else:
            idle += 1
        if idle == PATIENCE:
            break
    return best


def draft_cost(base: BaseModel, weights: dict[Block, int], chosen: frozenset[Block]) -> float:
    """Return the weights that a drafted token reads, as a share of those of a plain pass."""
    head = base.model.get_output_embeddings().weight.numel()
    total = sum(weights.values()) + head
    return (total - sum(weights[block] for block in chosen)) / total


def evaluate_blocks(
    base: BaseModel, data: Sequence[AnsweredPrompt], blocks: Blocks, cost: float, settings: SearchSettings
) -> Found:
    """Return what drafts without `blocks`, of this `cost` each, are worth on `data`."""
    sights = list(look(base, data, blocks))
    agreement = float(np.concatenate([sight.right for sight in sights]).mean())
    best: Found | None = None
    for most in settings.drafted:
        for confidence in settings.confidences:
            steps, tokens, drafted = passes(sights, most, confidence)
            speedup = tokens / (steps + drafted * (cost + settings.row_cost))
            if best is None or speedup > best.speedup:
                best = Found(blocks, most, confidence, speedup, tokens / steps, agreement, cost)
    assert best is not None
    return best


@torch.inference_mode()
def look(base: BaseModel, data: Sequence[AnsweredPrompt], blocks: Blocks) -> Iterator[Sight]:
    """Yield what the draft without `blocks` says of each text."""
    parts = decoder_parts(base.model)
    last = len(parts.layers)
    with without(base.model, blocks):
        for sequence in data:
            batch = make_batch([sequence], 0, None, None).to(base.model.device)
            states = run_context(base.model, (last,), batch.input_ids).hidden[last][0]
            start = len(sequence.prompt)
            # What predicts a token is the row before it.
            logits = parts.capped(parts.head(parts.norm(states[start - 1 : len(sequence) - 1]))).float()
            best = logits.max(-1)
            answer = torch.tensor(sequence.answer, device=logits.device)
            sure = (best.values - logits.logsumexp(-1)).exp()
            yield Sight((best.indices == answer).cpu().numpy(), sure.cpu().numpy())


def passes(sights: Sequence[Sight], most: int, confidence: float) -> tuple[int, int, int]:
    """Return the passes of the whole model behind the prompts', the tokens that they make certain, and the tokens
    drafted: up to `most` in a row, of which one less sure than `confidence` is the last.
    """
    assert 1 <= most <= MOST_DRAFTED
    steps = tokens = drafted = 0
    for sight in sights:
        right, sure = sight.right.tolist(), sight.sure.tolist()
        # The prompt's pass makes the first token certain.
        place, length = 1, len(right)
        while place < length:
            end = min(place + most, length)
            stop = next((at + 1 for at in range(place, end) if sure[at] < confidence), end)
            accepted = next((at for at in range(place, stop) if not right[at]), stop) - place
            drafted += stop - place
            # Where all are right the pass says one more.
            made = min(accepted + 1, length - place)
            steps += 1
            tokens += made
            place += made
    return max(1, steps), max(1, tokens), drafted
