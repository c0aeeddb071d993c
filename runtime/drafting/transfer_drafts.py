"""Transfer layers as a draft source: what the pseudo rows of the last pass say, as probabilities to be accepted."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.drafting.best_first import best_first_tree
from runtime.drafting.correction import SHORTLIST, TokenCorrection, corrected
from runtime.drafting.drafts import AdjustedDrafts, DraftStep
from runtime.drafting.foresight import Foresight, foreseen
from runtime.drafting.reliability import Reliability
from runtime.drafting.source import Context
from runtime.sampling.noise import Noise
from runtime.tree import Tree


class TransferDrafts:
    """Drafts of the transfer layers, reordered by a token correction if there is one.

    Their probabilities are turned into those of acceptance: for greedy decoding by `reliability`; for sampling at a
    `temperature` above 0 by that temperature, and with the `noise` of its draws by `foresight`.
    """

    name = "transfer layers"

    def __init__(
        self,
        correction: TokenCorrection | None = None,
        reliability: Reliability | None = None,
        temperature: float = 0.0,
        noise: Noise | None = None,
        foresight: Foresight | None = None,
    ) -> None:
        self._correction = correction
        self._reliability = reliability
        self._temperature = temperature
        self._noise = noise
        self._foresight = (foresight or Foresight()).at(temperature)

    def shortlist(self, max_rows: int) -> int:
        """See `DraftSource.shortlist`."""
        reordered = self._correction is not None or self._temperature > 0.0
        return max(SHORTLIST, max_rows) if reordered else max_rows

    def propose(self, context: Context) -> Tree:
        """See `DraftSource.propose`."""
        rows = context.max_rows
        # Noise may bring any candidate to the top.
        kept = rows if self._noise is None else self.shortlist(rows)

        def adjusted(step: int, found: DraftStep) -> DraftStep:
            return self._adjusted(step, found, context)

        drafts = AdjustedDrafts(corrected(context.drafted, self._correction, kept), adjusted)
        return best_first_tree(context.token, drafts, rows, context.least)

    def accept(self, tokens: Sequence[int]) -> None:
        """See `DraftSource.accept`: nothing is kept from pass to pass."""

    def _adjusted(self, step: int, candidates: DraftStep, context: Context) -> DraftStep:
        """Return the candidates with the probability that the base model chooses them."""
        if self._temperature > 0.0:
            found = tempered(candidates, self._temperature)
            if self._noise is None:
                return found
            # The certain token is at the position of the context's length.
            waits = self._noise.waits(context.length + 1 + step, found.tokens)
            return foreseen(found, waits, self._foresight[min(step, len(self._foresight) - 1)], context.max_rows)
        if self._reliability is None:
            return candidates
        # Shares observed of candidates one by one may add up to more than 1, and at most one of them is right.
        probabilities = self._reliability(step, candidates.probabilities)
        return DraftStep(candidates.tokens, probabilities / max(1.0, float(probabilities.sum())))


def tempered(step: DraftStep, temperature: float) -> DraftStep:
    """Return the step with its probabilities as sampling at `temperature` would have them.

    Tokens off the shortlist are known only to be no more probable than the last one on it.
    """
    # Relative to the best one: at a low temperature the powers of all of them may be too small for a float.
    weights = (step.probabilities / step.probabilities[0]) ** (1.0 / temperature)
    last = float(step.probabilities[-1])
    rest = max(0.0, 1.0 - float(step.probabilities.sum()))
    total = float(weights.sum()) + (rest * float(weights[-1]) / last if last > 0.0 else 0.0)
    return DraftStep(step.tokens, weights / total)
