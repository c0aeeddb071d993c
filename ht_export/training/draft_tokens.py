"""The tokens that drafts are chosen from: those that the base model writes most, as its own text tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ht_export.training.data import AnsweredPrompt
from runtime.errors import InputError


def choose_draft_tokens(
    data: Sequence[AnsweredPrompt],
    size: int,
    vocab_size: int,
    stop_tokens: Iterable[int] = (),
    texts: Iterable[Sequence[int]] = (),
) -> Tensor:
    """Return the draft tokens [V_d], ascending: all stop tokens, then the most frequent tokens of the answers, then
    those of the prompts and of further `texts`, then all others, as many as there is room for in `size`; equals by id.

    Raises `InputError` where the size is none that a part of the vocabulary can have.
    """
    stops = check_draft_size(size, vocab_size, stop_tokens)
    answers = _counts((one.answer for one in data), vocab_size)
    prompts = _counts(chain((one.prompt for one in data), texts), vocab_size)
    prompts[answers > 0] = 0
    ids = np.arange(vocab_size)
    is_stop = np.isin(ids, stops)
    # The last key counts first.
    order = np.lexsort((ids, -prompts, -answers, ~is_stop))
    return torch.from_numpy(np.sort(order[:size]))


def check_draft_size(size: int, vocab_size: int, stop_tokens: Iterable[int]) -> list[int]:
    """Return the stop tokens, all of which a draft head has, ascending. Raises `InputError` where `size` is none that a
    part of the vocabulary can have.
    """
    # A model may name tokens beyond its vocabulary: it never chooses them.
    stops = sorted({token for token in stop_tokens if token < vocab_size})
    least = max(1, len(stops))
    if not least <= size < vocab_size:
        raise InputError(
            f"the size of the draft head must be at least {least}{' (the stop tokens)' if stops else ''} and less than "
            f"the model's vocabulary of {vocab_size} tokens, not {size}; 8192 is usual"
        )
    return stops


def covered(tokens: Tensor, data: Sequence[AnsweredPrompt]) -> float:
    """Return the share of the answers' tokens that are among the draft tokens [V_d]."""
    counts = _counts((one.answer for one in data), 1 + max(max(one.answer) for one in data))
    kept = tokens.cpu().numpy()
    return float(counts[kept[kept < len(counts)]].sum() / counts.sum())


def described(tokens: Tensor, data: Sequence[AnsweredPrompt]) -> dict[str, Any]:
    """Return what a recipe says of draft tokens that were chosen from this data."""
    return {"size": len(tokens), "answer_tokens_covered": round(covered(tokens, data), 5)}


def _counts(texts: Iterable[Sequence[int]], vocab_size: int) -> NDArray[np.int64]:
    """Return how often each token occurs, [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for text in texts:
        np.add.at(counts, np.array(text, dtype=np.int64), 1)
    return counts
