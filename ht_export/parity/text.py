"""The text of an engine against that of `transformers.generate`, and against itself under other shapes of a pass.

Where two texts part, their tokens' logits are looked at: two tokens as good as each other may change places by rounding
alone. How much rounding there is, is measured: the logits of the same tokens, one row a pass and several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ht_export.verify.logits import logits_of
from runtime.generator import Generator

# Rows of a pass that are compared with one row a pass.
ROWS = 8
# Factor for a pair of tokens on how far apart logits of one token may be: each of two may be off by as much.
BOTH_SIDES = 2.0
# In the place of the token of a text that has none there.
ENDED = "(the end)"


@dataclass(frozen=True)
class Divergence:
    """Where two texts part: at new token `position`, counted from 0, where they have the two `tokens`; `gap` is how far
    apart their logits are there, `allowed` how far rounding may bring them, `explained` whether that is enough.
    """

    position: int
    gap: float
    explained: bool
    allowed: float
    tokens: tuple[str, str]


@dataclass(frozen=True)
class TextParity:
    """One prompt. `tokens` are those of plain decoding in the engine; the divergences are plain decoding's from
    `transformers`, and speculative from plain decoding's.

    The logits of the same tokens differ by at most `logit_error` from those of `transformers`, and by `self_error`
    between passes of one row and of several; `flips` of the tokens would then be others.
    """

    prompt: str
    tokens: int
    from_transformers: Divergence | None
    from_plain: Divergence | None
    logit_error: float
    self_error: float
    flips: int


@dataclass(frozen=True)
class TextSummary:
    """All prompts: how many texts are the same, and how many of the tokens come before texts part."""

    prompts: list[TextParity] = field(default_factory=list)

    @property
    def wrong(self) -> list[TextParity]:
        """The texts that rounding does not explain."""
        return [
            one
            for one in self.prompts
            if any(found and not found.explained for found in (one.from_transformers, one.from_plain))
        ]

    def same(self, which: str) -> int:
        """Return how many texts do not part."""
        return sum(getattr(one, which) is None for one in self.prompts)

    def agreement(self, which: str) -> float:
        """Return the share of tokens before texts part."""
        agreed = [getattr(one, which).position if getattr(one, which) else one.tokens for one in self.prompts]
        return sum(agreed) / max(1, sum(one.tokens for one in self.prompts))


@torch.inference_mode()
def transformers_text(base: Any, ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Return the new tokens of `generate`, greedily."""
    given = torch.tensor([ids], device=base.device)
    output = base.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=max_new_tokens, do_sample=False,
        repetition_penalty=1.0,
    )  # fmt: skip
    return output[0, len(ids) :].tolist()


@torch.inference_mode()
def compare_text(
    generator: Generator, base: Any, name: str, prompt: str, max_new_tokens: int, tolerance: float
) -> TextParity:
    """Answer one prompt in every way and compare. A logit may be off by `tolerance` of the largest one."""
    ids = generator.encode(prompt)
    length = min(max_new_tokens, generator.about.max_context - len(ids))
    theirs = transformers_text(base, ids, length)
    plain = generator.generate(prompt, max_new_tokens=length, speculate=False).tokens
    found = generator.generate(prompt, max_new_tokens=length).tokens
    text = [*ids, *plain[:-1]]
    # [n, V]: at the end of the prompt, and after each token but the last.
    own = logits_of(generator, text, len(ids), 1)
    wide = logits_of(generator, text, len(ids), ROWS)
    reference = base(torch.tensor([text], device=base.device)).logits[0, len(ids) - 1 :].float().cpu().numpy()
    self_error = float(np.abs(own - wide).max())

    def spell(token: int) -> str:
        return generator.token_bytes(token).decode(errors="replace")

    allowed = BOTH_SIDES * tolerance * float(np.abs(reference).max())
    return TextParity(
        prompt=name,
        tokens=len(plain),
        from_transformers=_divergence(plain, theirs, reference, allowed, spell),
        from_plain=_divergence(found, plain, own, BOTH_SIDES * self_error, spell),
        logit_error=float(np.abs(own - reference).max()),
        self_error=self_error,
        flips=int((own.argmax(-1) != wide.argmax(-1)).sum()),
    )


def _divergence(
    text: Sequence[int], other: Sequence[int], logits: NDArray[np.float32], allowed: float, spell: Callable[[int], str]
) -> Divergence | None:
    """Return where `text` parts from `other`, by logits [n, V] that hold for what they have in common."""
    if list(text) == list(other):
        return None
    pairs = list(zip(text, other, strict=False))
    position = next((index for index, (mine, its) in enumerate(pairs) if mine != its), len(pairs))
    if position == len(pairs):
        # One is longer.
        mine, its = (spell(one[position]) if position < len(one) else ENDED for one in (text, other))
        return Divergence(position, math.inf, False, allowed, (mine, its))
    one, two = pairs[position]
    gap = float(abs(logits[position, one] - logits[position, two]))
    return Divergence(position, gap, gap <= allowed, allowed, (spell(one), spell(two)))
