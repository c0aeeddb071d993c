from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ht_export.model.attention import LayerAttention
from ht_export.model.attention import tree_attention as torch_tree_attention
from plugins.reference import tree_attention
from runtime.rows import lay_out
from runtime.tree import Tree
from tests.strategies import trees


@settings(deadline=None)
@given(
    trees(),
    st.integers(0, 9),
    st.sampled_from([(1, 1), (2, 1), (3, 2), (1, 4)]),
    st.booleans(),
    st.sampled_from([None, 0.5]),
    st.integers(0, 1000),
)
def test_the_pytorch_attention_is_the_numpy_definition(
    tree: Tree, capacity: int, heads: tuple[int, int], windowed: bool, softcap: float | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    group, kv_heads = heads
    rows = len(tree)
    mask = np.stack([lay_out(tree, (), (), 0).tree_mask, np.eye(rows, dtype=bool)])

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    inputs: list[np.ndarray] = [
        random(2, group * kv_heads, rows, 4),
        random(2, kv_heads, rows, 4),
        random(2, kv_heads, rows, 4),
        random(2, kv_heads, capacity, 4),
        random(2, kv_heads, capacity, 4),
        rng.integers(0, capacity + 1, 2),
        mask,
    ]
    first = rng.integers(-2, capacity + 2, (2, rows)) if windowed else None
    window = None if first is None else torch.from_numpy(first)
    tensors: list[Any] = [*map(torch.from_numpy, inputs), window, LayerAttention(0.7, softcap=softcap)]
    definition: list[Any] = [*inputs, 0.7, first, softcap or 0.0]
    np.testing.assert_allclose(torch_tree_attention(*tensors).numpy(), tree_attention(*definition), atol=1e-5)
