"""Drafts: what may follow a token, from the draft logits of one node's pseudo rows.

The draft of step k was made without knowing the tokens of the steps before it. When a tree is built they are known: the
certain token at its root, and the candidates above a node. A *token correction* brings them in. It adds to the logit of
candidate t after token c the product of two short trained vectors, <candidate_t, scale_k * context_c>, much as Hydra
heads (arXiv 2402.05109) and recurrent drafters condition on the token before, but by table lookup: no layer runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.candidates import largest
from runtime.errors import EngineFileError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

# Candidates of a step that a correction may reorder.
SHORTLIST = 64
# Of a wait, exponentially distributed: log 2.
MEDIAN_WAIT = 0.6931
# exp() of more than this would leave nothing of the draft itself.
LARGEST_CORRECTION = 30.0


@dataclass(frozen=True)
class DraftStep:
    """The most probable tokens of one draft step, best first: tokens [N], probabilities [N]."""

    tokens: IntArray
    probabilities: FloatArray


class Drafts(Protocol):
    """The drafts of K steps."""

    def __len__(self) -> int:
        """Return K."""
        ...

    def after(self, step: int, token: int) -> DraftStep:
        """Return the candidates of `step` (0-based) where the token before them is `token`."""
        ...


class IndependentDrafts(list[DraftStep]):
    """Drafts that are the same whatever the token before."""

    def after(self, step: int, token: int) -> DraftStep:
        """See `Drafts.after`."""
        return self[step]


@dataclass(frozen=True)
class TokenCorrection:
    """The tables of a token correction: candidates [V, r], contexts [V, r], scales [K, r]."""

    candidates: NDArray[np.floating]
    contexts: NDArray[np.floating]
    scales: NDArray[np.floating]

    def rows(self, step: int, tokens: IntArray) -> NDArray[np.float32]:
        """Return [N, r]: what `tokens` [N] have in the tables at `step` (0-based), whatever the token before."""
        return np.multiply(self.candidates[tokens], self.scales[step], dtype=np.float32)

    def after(self, rows: NDArray[np.float32], before: int) -> FloatArray:
        """Return what is added to the logits of the N tokens that `rows` [N, r] are of, after the token `before`."""
        added = rows @ self.contexts[before].astype(np.float32)
        return np.clip(added, -LARGEST_CORRECTION, LARGEST_CORRECTION).astype(np.float64)

    def write(self, path: Path) -> None:
        """Write the tables as one float16 array [V + V + K, r]."""
        with path.open("wb") as file:
            np.save(file, np.concatenate([self.candidates, self.contexts, self.scales]).astype(np.float16))

    @classmethod
    def read(cls, path: Path, vocab_size: int, num_steps: int) -> TokenCorrection:
        """Map the tables of `path` into memory. Raises `EngineFileError` when they do not fit."""
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise EngineFileError(f"{path} is not a token correction ({error}); export the engine again") from error
        if array.ndim != 2 or len(array) != 2 * vocab_size + num_steps:
            raise EngineFileError(
                f"{path} has the shape {list(array.shape)} where {2 * vocab_size + num_steps} rows are expected; "
                "export the engine again"
            )
        scales = np.array(array[2 * vocab_size :], dtype=np.float32)
        # Still mapped, but indexed as fast as any array.
        array = np.asarray(array)
        return cls(array[:vocab_size], array[vocab_size : 2 * vocab_size], scales)


class CorrectedDrafts:
    """Drafts reordered by a token correction; `steps` are shortlists of the uncorrected drafts."""

    def __init__(self, steps: Sequence[DraftStep], correction: TokenCorrection, count: int) -> None:
        self.steps = steps
        self.correction = correction
        self.count = count
        self._rows: dict[int, NDArray[np.float32]] = {}
        self._known: dict[tuple[int, int], DraftStep] = {}

    def __len__(self) -> int:
        return len(self.steps)

    def after(self, step: int, token: int) -> DraftStep:
        """See `Drafts.after`. Tokens off the shortlist keep their probability before normalisation."""
        if (found := self._known.get((step, token))) is None:
            shortlist = self.steps[step]
            if step not in self._rows:
                self._rows[step] = self.correction.rows(step, shortlist.tokens)
            weights = shortlist.probabilities * np.exp(self.correction.after(self._rows[step], token))
            rest = max(0.0, 1.0 - float(shortlist.probabilities.sum()))
            order = np.argsort(-weights, kind="stable")[: self.count]
            found = DraftStep(shortlist.tokens[order], weights[order] / (float(weights.sum()) + rest))
            self._known[step, token] = found
        return found


class AdjustedDrafts:
    """Drafts with other probabilities: `adjust` makes them of a step's number and its candidates."""

    def __init__(self, drafts: Drafts, adjust: Callable[[int, DraftStep], DraftStep]) -> None:
        self.drafts = drafts
        self.adjust = adjust
        self._known: dict[tuple[int, int], DraftStep] = {}

    def __len__(self) -> int:
        return len(self.drafts)

    def after(self, step: int, token: int) -> DraftStep:
        """See `Drafts.after`."""
        if (found := self._known.get((step, token))) is None:
            found = self._known[step, token] = self.adjust(step, self.drafts.after(step, token))
        return found


def corrected(steps: Sequence[DraftStep], correction: TokenCorrection | None, count: int) -> Drafts:
    """Return the drafts of `steps`, each with its `count` best candidates after any token."""
    return IndependentDrafts(steps) if correction is None else CorrectedDrafts(steps, correction, count)


def tempered(step: DraftStep, temperature: float) -> DraftStep:
    """Return the step with its probabilities as sampling at `temperature` would have them.

    Of the tokens off the shortlist no more is known than that none is more probable than the last one on it.
    """
    # Relative to the best one: at a low temperature the powers of all of them may be too small for a float.
    weights = (step.probabilities / step.probabilities[0]) ** (1.0 / temperature)
    last = float(step.probabilities[-1])
    rest = max(0.0, 1.0 - float(step.probabilities.sum()))
    total = float(weights.sum()) + (rest * float(weights[-1]) / last if last > 0.0 else 0.0)
    return DraftStep(step.tokens, weights / total)


def foreseen(step: DraftStep, waits: FloatArray, trust: float, count: int) -> DraftStep:
    """Return the `count` candidates that most probably win the race of the base model's draw, with how probably.

    The step's probabilities are at the temperature of sampling; `waits` [N] are the candidates' own (see
    `runtime.noise`). Were the probabilities the base model's, the least wait / probability would win for sure. As they
    are off, short waits count as far as `trust`, 0 to 1, says: probability * wait ** -trust.
    """
    weights = step.probabilities * waits**-trust
    rest = max(0.0, 1.0 - float(step.probabilities.sum())) * MEDIAN_WAIT**-trust
    order = np.argsort(-weights, kind="stable")[:count]
    return DraftStep(step.tokens[order], weights[order] / max(float(weights.sum()) + rest, np.finfo(float).tiny))


def most_probable(logits: NDArray[np.float32], count: int) -> DraftStep:
    """Return the `count` most probable tokens of a softmax over logits [V]."""
    near = largest(logits, min(count, len(logits)))
    values = logits[near]
    # Equal logits: the smaller token first.
    order = np.lexsort((near, -values))[:count]
    values = values[order]
    weights = logits - values[0]
    total = float(np.exp(weights, out=weights).sum(dtype=np.float64))
    return DraftStep(near[order], np.exp((values - values[0]).astype(np.float64)) / total)
