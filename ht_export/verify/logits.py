"""The logits of an engine for a given text, however many rows a pass has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.generator import Generator
from runtime.rows import lay_out
from runtime.tree import chain


def logits_of(generator: Generator, text: Sequence[int], prompt_tokens: int, rows: int) -> NDArray[np.float32]:
    """Return the engine's logits at the prompt's last token and at each token after it, `rows` of them a pass."""
    engine, dims = generator.engine, generator.engine.dims
    plan = generator.about.plan
    rows = min(rows, plan.limits.max_rows) if plan else rows
    cache = engine.new_cache()
    nothing = (np.empty(0, dtype=np.int64),) * dims.num_steps
    start, kept = 0, []
    while start < len(text):
        in_prompt = start < prompt_tokens - 1
        end = (
            min(prompt_tokens - 1, start + generator.about.prompt_chunk) if in_prompt else min(len(text), start + rows)
        )
        tree = chain(text[start:end])
        wanted = np.array([len(tree) - 1]) if in_prompt else np.arange(len(tree))
        outputs = engine.run(lay_out(tree, nothing, dims.join_order, start, logit_rows=wanted), cache)
        if not in_prompt:
            kept.append(np.array(outputs.logits))
        cache.commit(outputs, range(len(tree)))
        start = end
    return np.concatenate(kept)
