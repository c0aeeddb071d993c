"""The logits of an engine for a given text, however many rows a pass has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.engines.protocol import Batch
from runtime.generator import Generator
from runtime.rows import lay_out, prompt_rows
from runtime.tree import chain


def logits_of(generator: Generator, text: Sequence[int], prompt_tokens: int, rows: int) -> NDArray[np.float32]:
    """Return the engine's logits at the prompt's last token and at each token after it, `rows` of them a pass."""
    engine, order = generator.engine, generator.engine.dims.join_order
    plan = generator.about.plan
    rows = min(rows, plan.limits.max_rows) if plan else rows
    nothing = (np.empty(0, dtype=np.int64),) * len(order)
    slot = engine.new_slot()
    kept = []
    while slot.length < len(text):
        start = slot.length
        in_prompt = start < prompt_tokens - 1
        most = min(prompt_tokens - 1, start + generator.about.prompt_chunk) if in_prompt else start + rows
        tokens = text[start:most]
        wanted = prompt_rows(tokens, order, start) if in_prompt else lay_out(chain(tokens), nothing, order, start)
        result = engine.run(Batch.of([wanted], [slot]))
        if not in_prompt:
            logits = result.outputs(0).logits
            kept += [logits[row].copy() for row in range(len(logits))]
        engine.commit(result, [range(len(tokens))])
    return np.array(kept)
