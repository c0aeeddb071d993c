"""`PromptScores`: how likely the base model finds the tokens of a prompt."""

from __future__ import annotations

import numpy as np

from runtime.sampling.choice import Choice, Chosen
from runtime.sampling.options import TokenLogProbability
from runtime.sampling.sampler import log_probability


class PromptScores:
    """The log-probabilities of a prompt's tokens after those before them, and of the `count` best in their place.

    `found` has an entry for each token, None for the first, which follows nothing.
    """

    def __init__(self, count: int, vocab_size: int) -> None:
        self._count = count
        self._scratch = np.empty(vocab_size, dtype=np.float32)
        self.found: list[TokenLogProbability | None] = [None]

    def add(self, found: Choice, token: int) -> None:
        """Score the next `token`, where `found` are the base model's logits [V] after all tokens before it."""
        assert not isinstance(found, Chosen), "a prompt is scored by whole logits"
        self.found.append(log_probability(found, token, self._count, self._scratch))
