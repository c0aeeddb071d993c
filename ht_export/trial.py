"""What a new engine's drafts are worth, on prompts of a user's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ht_export.progress import Stage
from ht_export.prompts import Conversation, evenly
from runtime import Generator

PROMPTS = 16
TOKENS = 64


@dataclass(frozen=True)
class Trial:
    """Answers to so many `prompts`, of so many `tokens` in so many `steps`; plain decoding takes a step for each."""

    prompts: int
    tokens: int
    steps: int

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a step made certain."""
        return self.tokens / self.steps if self.steps else 0.0


def try_drafts(engine: Path, conversations: list[Conversation], stage: Stage) -> Trial:
    """Answer the first turns of up to `PROMPTS` conversations, evenly, greedily and by the transfer layers' drafts
    alone, with the engine's own tree. Raises `InputError`.
    """
    chosen = evenly(conversations, PROMPTS)
    tokens = steps = 0
    with stage("measuring the drafts") as tell, Generator(engine, adapt=False, verify_weights=False) as generator:
        for number, one in enumerate(chosen, start=1):
            tell(f"prompt {number} of {len(chosen)}")
            result = generator.generate(one.turns[0], max_new_tokens=TOKENS, ngrams=False)
            tokens += len(result.tokens)
            steps += result.steps
    return Trial(len(chosen), tokens, steps)
