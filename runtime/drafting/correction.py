"""The token correction: drafts reordered for the token that came before.

The draft of step k was made without knowing the tokens of the steps before it. When a tree is built they are known: the
certain token at its root, and the candidates above a node. A *token correction* brings them in. It adds to the logit of
candidate t after token c the product of two short trained vectors, <candidate_t, scale_k * context_c>, much as Hydra
heads (arXiv 2402.05109) and recurrent drafters condition on the token before, but by table lookup: no layer runs again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.arrays import FloatArray, IntArray
from runtime.drafting.drafts import Drafts, DraftStep, IndependentDrafts
from runtime.errors import EngineFileError
from runtime.formats import Format

TABLES = Format("correction.npy", 1 << 32, "export the engine again", EngineFileError)
# A file of NumPy's format 1.0 begins so where it holds a table of float16, row by row, in rows and columns.
NPY = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)"
    rb"\{'descr': '<f2', 'fortran_order': False, "
    rb"'shape': \((?P<rows>[1-9]\d{0,9}), (?P<columns>[1-9]\d{0,9})\), \} *\n",
    re.DOTALL,
)
# Numbers that are looked at together: as many as a cache holds.
PART = 1 << 18
# The bits of a float16 that are all set in an infinity, and in what is no number.
EXPONENT = np.uint16(0x7C00)

# Candidates of a step that a correction may reorder.
SHORTLIST = 64
# exp() of more than this would leave nothing of the draft itself.
LARGEST_CORRECTION = 30.0


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
        # Not `clip`, which takes longer than all else here.
        np.minimum(np.maximum(added, -LARGEST_CORRECTION, out=added), LARGEST_CORRECTION, out=added)
        return added.astype(np.float64)

    def write(self, path: Path) -> None:
        """Write the tables as one float16 array [V + V + K, r]."""
        with path.open("wb") as file:
            np.save(file, np.concatenate([self.candidates, self.contexts, self.scales]).astype(np.float16))

    @classmethod
    def read(cls, path: Path, vocab_size: int, num_steps: int) -> TokenCorrection:
        """Read the tables of `path`; see `of`."""
        return cls.of(TABLES.content(path), path, vocab_size, num_steps)

    @classmethod
    def of(cls, content: bytes, where: object, vocab_size: int, num_steps: int) -> TokenCorrection:
        """Return the tables in `content`, which was read at `where` and which they keep: they are not copied.

        Raises `EngineFileError` when they do not fit, or hold what is no number.
        """
        # Not mapped: another program that cuts the file short would end this one.
        header = NPY.match(content)
        if header is None or int.from_bytes(header["length"], "little") != header.end() - header.start("length") - 2:
            raise TABLES.unfit(where, "it does not begin as a table of float16 of two dimensions does")
        rows, columns = int(header["rows"]), int(header["columns"])
        expected = 2 * vocab_size + num_steps
        if rows != expected:
            raise TABLES.unfit(where, f"it has {rows} rows where {expected} are expected")
        if len(content) - header.end() != 2 * rows * columns:
            raise TABLES.unfit(where, f"it has {len(content)} bytes, not those of {rows} x {columns} numbers")
        values = np.frombuffer(content, "<f2", offset=header.end())
        _check_finite(values, columns, vocab_size, where)
        array = values.reshape(rows, columns)
        scales = array[2 * vocab_size :].astype(np.float32)
        return cls(array[:vocab_size], array[vocab_size : 2 * vocab_size], scales)


def _check_finite(values: NDArray[np.float16], columns: int, vocab_size: int, where: object) -> None:
    """Raise `EngineFileError`, naming the row, for a value that is not finite."""
    bits = values.view(np.uint16)
    for start in range(0, len(bits), PART):
        odd = (bits[start : start + PART] & EXPONENT) == EXPONENT
        if odd.any():
            first = start + int(odd.argmax())
            part, row = divmod(first // columns, vocab_size)
            name = ("candidates", "contexts", "scales")[part]
            raise TABLES.unfit(where, f"{name} hold {values[first]} in row {row}")


class CorrectedDrafts:
    """Drafts reordered by a token correction; `steps` are shortlists of the uncorrected drafts."""

    def __init__(self, steps: Sequence[DraftStep], correction: TokenCorrection, count: int) -> None:
        self.steps = steps
        self.correction = correction
        self.count = count
        # What the tokens of a step have in the tables, and the probability of all that are off the shortlist.
        self._of_step: dict[int, tuple[NDArray[np.float32], float]] = {}
        self._known: dict[tuple[int, int], DraftStep] = {}

    def __len__(self) -> int:
        return len(self.steps)

    def after(self, step: int, token: int) -> DraftStep:
        """See `Drafts.after`. Tokens off the shortlist keep their probability before normalisation."""
        if (found := self._known.get((step, token))) is None:
            shortlist = self.steps[step]
            if step not in self._of_step:
                rest = max(0.0, 1.0 - float(shortlist.probabilities.sum()))
                self._of_step[step] = self.correction.rows(step, shortlist.tokens), rest
            rows, rest = self._of_step[step]
            weights = self.correction.after(rows, token)
            np.multiply(np.exp(weights, out=weights), shortlist.probabilities, out=weights)
            order = (-weights).argsort(kind="stable")[: self.count]
            found = DraftStep(shortlist.tokens[order], weights[order] / (float(weights.sum()) + rest))
            self._known[step, token] = found
        return found


def corrected(steps: Sequence[DraftStep], correction: TokenCorrection | None, count: int) -> Drafts:
    """Return the drafts of `steps`, each with its `count` best candidates after any token."""
    return IndependentDrafts(steps) if correction is None else CorrectedDrafts(steps, correction, count)
