"""Random trees for property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from runtime.drafting.drafts import DraftStep, IndependentDrafts
from runtime.tree import Tree


@st.composite
def trees(draw: st.DrawFn, max_rows: int = 12, vocab_size: int = 264) -> Tree:
    """Any tree in topological order whose siblings hold different tokens."""
    size = draw(st.integers(1, max_rows))
    parents, depths = [-1], [0]
    tokens = [draw(st.integers(0, vocab_size - 1))]
    for node in range(1, size):
        parent = draw(st.integers(0, node - 1))
        taken = {tokens[other] for other in range(1, node) if parents[other] == parent}
        tokens.append(draw(st.sampled_from(sorted(set(range(vocab_size)) - taken))))
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return Tree(np.array(tokens), np.array(parents), np.array(depths), np.ones(size))


@st.composite
def draft_steps(draw: st.DrawFn, max_steps: int = 4) -> IndependentDrafts:
    """Draft steps with different tokens in falling probability."""
    steps = IndependentDrafts()
    for _ in range(draw(st.integers(0, max_steps))):
        count = draw(st.integers(1, 6))
        weights = sorted(draw(st.lists(st.floats(0.01, 1.0), min_size=count, max_size=count)), reverse=True)
        tokens = draw(st.permutations(range(20)))[:count]
        steps.append(DraftStep(np.array(tokens), np.array(weights) / (sum(weights) * 1.1)))
    return steps
