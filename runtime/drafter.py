"""What to verify next: a tree from the drafts of the last pass and from the text itself, as large as it pays."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.calibration import Calibration
from runtime.drafts import (
    SHORTLIST,
    AdjustedDrafts,
    DraftStep,
    IntArray,
    TokenCorrection,
    corrected,
    foreseen,
    tempered,
)
from runtime.ngrams import Continuation, Ngrams
from runtime.noise import Noise
from runtime.sizing import Sizing
from runtime.tree import Tree, best_first_tree, graft, likely_ends

# By draft step, see `foreseen`: of the values tried, those with the most tokens per step in development texts.
TRUST = (0.6, 0.5, 0.4)


class Drafter:
    """Builds the trees of one text.

    `calibration` is for greedy decoding; `temperature` above 0 is that of sampling, and `noise` that of its draws.
    `ngrams` None leaves out continuations from the text itself.
    """

    def __init__(
        self,
        sizing: Sizing,
        correction: TokenCorrection | None = None,
        calibration: Calibration | None = None,
        temperature: float = 0.0,
        ngrams: Ngrams | None = None,
        noise: Noise | None = None,
    ) -> None:
        self.sizing = sizing
        self._correction = correction
        self._calibration = calibration
        self._temperature = temperature
        self._noise = noise
        self._context = 0
        self._ngrams = ngrams
        self._continuation = Continuation()

    @property
    def draft_steps(self) -> int:
        """How many draft steps may be of use."""
        return self.sizing.draft_steps

    @property
    def shortlist(self) -> int:
        """How many candidates of each draft step are of use."""
        rows = self.sizing.most_rows
        return rows if self._correction is None and self._temperature == 0.0 else max(SHORTLIST, rows)

    def begin(self, prompt: Sequence[int]) -> None:
        """Take the tokens of the prompt."""
        if self._ngrams is not None:
            self._ngrams.extend(prompt)

    def propose(self, token: int, drafted: Sequence[DraftStep], context: int) -> tuple[Tree, tuple[IntArray, ...]]:
        """Return the tree to verify, `token` at its root, and the nodes that get pseudo rows, by draft step.

        `drafted` are the drafts of what follows `token`, none if the pass before made none for it.
        """
        rows = self.sizing.most_rows
        self._context = context
        # Noise may bring any of them to the top.
        kept = rows if self._noise is None else self.shortlist
        drafts = AdjustedDrafts(corrected(drafted, self._correction, kept), self._adjusted)
        tree = best_first_tree(token, drafts, rows)
        if self._ngrams is not None:
            self._ngrams.extend([token])
            self._continuation = self._ngrams.continuation(rows - 1)
            if self._continuation.tokens:
                tree = graft(tree, self._continuation.tokens, self._continuation.probabilities, rows)
        sizes = self.sizing.choose(tree, context, bool(drafted))
        tree = tree.first(sizes.tree_rows)
        return tree, likely_ends(tree, sizes.pseudo_rows)

    def learn(self, accepted: Sequence[int], token: int) -> None:
        """Take note of the tokens that were accepted, and of the one that the base model chose after them."""
        self.sizing.learn(len(accepted))
        if self._ngrams is not None:
            self._ngrams.learn(self._continuation, [*accepted, token])
            self._ngrams.extend(accepted)

    def _adjusted(self, step: int, candidates: DraftStep) -> DraftStep:
        """Return the candidates with the probability that the base model chooses them."""
        if self._temperature > 0.0:
            found = tempered(candidates, self._temperature)
            if self._noise is None:
                return found
            # The certain token is at the position of the context's length.
            waits = self._noise.waits(self._context + 1 + step, found.tokens)
            return foreseen(found, waits, TRUST[min(step, len(TRUST) - 1)], self.sizing.most_rows)
        if self._calibration is None:
            return candidates
        # What was observed of candidates one by one may be more than 1 together, and at most one of them is right.
        probabilities = self._calibration(step, candidates.probabilities)
        return DraftStep(candidates.tokens, probabilities / max(1.0, float(probabilities.sum())))
