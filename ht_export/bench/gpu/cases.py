"""Calls of tree attention to check: a grid of shapes and types, random inputs, and what the definition gives."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

from plugins.launch import Scores

# Tolerance, relative to a row's largest output. Rounding alone, emulated on the CPU over these shapes, makes at most
# 9e-4 and 7e-3; a cache read one row short makes 7e-3 or more in float16, at the longest contexts too.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}
GRID: dict[str, tuple[Any, ...]] = {
    "dtype": ("float16", "bfloat16"),
    "head_dim": (16, 64, 80, 96, 128, 256),
    "heads": ((1, 1), (3, 3), (4, 2), (8, 1), (1, 4)),
    "rows": (1, 5, 16, 33, 256),
    "capacity": (0, 1, 64, 333, 2048, 5000),
    "batch": (1, 3, 8),
    "windowed": (False, True),
    # Low enough that scores come near it.
    "softcap": (0.0, 2.0),
}


@dataclass(frozen=True)
class Case:
    """One call: `heads` are query heads by key/value head, and key/value heads."""

    dtype: str
    head_dim: int
    heads: tuple[int, int]
    rows: int
    capacity: int
    batch: int
    windowed: bool = False
    softcap: float = 0.0

    @property
    def scores(self) -> Scores:
        """The factor and the soft cap of its products."""
        return Scores(self.head_dim**-0.5, self.softcap)


def make_inputs(case: Case, generator: Any) -> dict[str, Any]:
    """Return random inputs; what lies behind the valid rows of the cache is not a number."""
    import torch

    device = generator.device
    dtype = getattr(torch, case.dtype)
    group, kv_heads = case.heads

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    lengths = torch.randint(0, case.capacity + 1, (case.batch,), generator=generator, device=device)
    # Where there are several, one fills the cache.
    lengths[1:2] = case.capacity
    shape = (case.batch, kv_heads, case.capacity, case.head_dim)
    keys, values = normal(*shape), normal(*shape)
    behind = torch.arange(case.capacity, device=device) >= lengths[:, None]
    for cache in (keys, values):
        cache.masked_fill_(behind[:, None, :, None], torch.nan)
    mask = torch.rand(case.batch, case.rows, case.rows, generator=generator, device=device) < 0.5
    window = {}
    if case.windowed:
        # Some rows see all of the cache, some a part, some nothing.
        first = torch.randint(-9, case.capacity + 9, (case.batch, case.rows), generator=generator, device=device)
        window["first_visible"] = first
    return {
        "query": normal(case.batch, group * kv_heads, case.rows, case.head_dim),
        "key_new": normal(case.batch, kv_heads, case.rows, case.head_dim),
        "value_new": normal(case.batch, kv_heads, case.rows, case.head_dim),
        "key_cache": keys,
        "value_cache": values,
        "cache_length": lengths,
        "tree_mask": mask.tril() | torch.eye(case.rows, dtype=torch.bool, device=device),
        **window,
    }


def reference(inputs: dict[str, Any], scores: Scores) -> Any:
    """Return what `plugins.reference.tree_attention` defines, computed by torch in float64 where the inputs are."""
    import torch

    batch, _, rows, _ = inputs["query"].shape
    capacity = inputs["key_cache"].shape[2]
    lengths = inputs["cache_length"]
    slots = torch.arange(capacity, device=lengths.device)
    cached = (slots < lengths[:, None])[:, None, :].expand(batch, rows, capacity)
    if "first_visible" in inputs:
        cached = cached & (slots >= inputs["first_visible"][..., None])
    visible = torch.cat([cached, inputs["tree_mask"]], dim=-1)[:, None]

    def joined(cache: str, new: str) -> Any:
        return torch.cat([inputs[cache].double().nan_to_num(), inputs[new].double()], dim=2)

    keys, values = joined("key_cache", "key_new"), joined("value_cache", "value_new")
    query = inputs["query"].double()
    if not scores.softcap:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, scale=scores.scale, enable_gqa=True
        )
    group = query.shape[1] // keys.shape[1]
    capped = query @ keys.repeat_interleave(group, dim=1).transpose(2, 3) * (scores.scale / scores.softcap)
    weights = (capped.tanh() * scores.softcap).masked_fill(~visible, -torch.inf).softmax(-1)
    return weights @ values.repeat_interleave(group, dim=1)


def cases(count: int, seed: int) -> list[Case]:
    """Return `count` cases of the grid, or all of it, drawn at random: a regular draw would leave whole values out."""
    every = [Case(*values) for values in itertools.product(*GRID.values())]
    return random.Random(seed).sample(every, min(count, len(every)))


def relative_error(found: Any, expected: Any) -> float:
    """Return the largest difference in any row of attention, relative to the row's largest value."""
    difference = (found.double() - expected).abs()
    return float((difference / expected.abs().amax(dim=-1, keepdim=True)).max())


def matches_definition(inputs: dict[str, Any], scores: Scores, expected: Any) -> bool:
    """Return whether the definition in numpy gives `expected`."""
    import numpy as np

    from plugins.reference import tree_attention

    arrays = {
        name: (tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy()
        for name, tensor in inputs.items()
    }
    found = tree_attention(**arrays, scale=scores.scale, softcap=scores.softcap)
    return bool(np.allclose(found, expected.cpu().numpy(), rtol=0, atol=1e-9))
