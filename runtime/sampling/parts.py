"""Choices made of a part of a row: an engine whose logits are on a GPU sends a few tokens in the place of all.

The whole row is the reference. A choice made of a part is the same one, in the same arithmetic, or it is None: then it
is not certain, and the row has to be had whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from runtime.arrays import Float32Array, IntArray
from runtime.sampling.candidates import candidates, reaching
from runtime.sampling.choice import Chosen, Race


@dataclass(frozen=True)
class Part:
    """Some tokens [N] of a row, in rising order, with their logits [N] divided by the temperature, of which the row's
    largest is `top`, a finite number.
    """

    tokens: IntArray
    logits: Float32Array
    top: float


def most_probable_of(part: Part) -> Chosen:
    """Return the arg-max of a row from all tokens whose logit is the `top`."""
    return Chosen(int(part.tokens[0]), part.top)


def first_of(race: Race, part: Part, position: int, others: float) -> Chosen | None:
    """Return the winner of a race without top-k and top-p at the absolute `position`, from tokens that may win.

    Every token that is left out and takes part waits longer than exp(-`others`).
    """
    tokens, weights = candidates(part.logits, part.top, min_p=race.min_p)
    if tokens is not None:
        part = Part(part.tokens[tokens], part.logits[tokens], part.top)
    if not len(part.tokens) or not math.isfinite(others):
        return None
    first = race.noise.first(position, part.tokens, weights)
    wait = race.noise.waits(position, part.tokens[first : first + 1])[0] / weights[first]
    return Chosen(int(part.tokens[first]), part.top) if wait <= math.exp(-others) else None


def drawn_from(race: Race, part: Part, position: int, total: float, margin: float) -> Chosen | None:
    """Return the winner of a race with top-k, top-p or both at the absolute `position`, from the tokens with the
    largest logits, all that equal the last of them included: `top_k` of them at least.

    The weights of the whole row, each its probability divided by the largest one, are `total` together, give or take
    `margin` times as much.
    """
    if race.top_k is not None:
        kept, weights = candidates(part.logits, part.top, top_k=race.top_k, top_p=race.top_p, min_p=race.min_p)
    else:
        assert race.top_p is not None, "a race that all tokens take part in"
        falling = np.sort(part.logits)[::-1]
        reached = np.exp(falling - np.float32(part.top)).astype(np.float64).cumsum()
        least, most = (int(reached.searchsorted(race.top_p * total * (1 + side))) + 1 for side in (-margin, margin))
        if least != most or most > len(falling):
            return None
        kept = reaching(part.logits, falling, most)
        within, weights = candidates(part.logits[kept], part.top, min_p=race.min_p)
        kept = kept if within is None else kept[within]
    tokens = part.tokens if kept is None else part.tokens[kept]
    return Chosen(int(tokens[race.noise.first(position, tokens, weights)]), part.top)
