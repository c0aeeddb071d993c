"""Attention of other packages, where they are installed, to time beside ours: FlashInfer and flash-attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

PACKAGES = ("flashinfer", "flash_attn", "xformers")


def installed() -> dict[str, str | None]:
    """Return the version of each package, None for one that cannot be imported."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
        except Exception:
            # A package for another CUDA raises whatever its loader does.
            found[name] = None
    return found


def other_ways(inputs: dict[str, Any], scale: float) -> dict[str, Callable[[], Any]]:
    """Return ways to have other packages attend to a cache of one length, by name; none where none is installed.

    Only FlashInfer's takes a tree's mask; those that do not are named so, and do less.
    """
    import torch

    query, tree_mask = inputs["query"], inputs["tree_mask"]
    batch, _, rows, _ = query.shape
    if not query.is_cuda:
        return {}
    capacity = inputs["key_cache"].shape[2]
    if not bool((inputs["cache_length"] == capacity).all()):
        return {}
    ways: dict[str, Callable[[], Any]] = {}
    versions = installed()
    # [., N, H, D], as all of them have it.
    keys, values = (
        torch.cat([inputs[f"{kind}_cache"], inputs[f"{kind}_new"]], dim=2).transpose(1, 2).contiguous()
        for kind in ("key", "value")
    )
    asked = query.transpose(1, 2).contiguous()
    if versions["flash_attn"]:
        flash = importlib.import_module("flash_attn").flash_attn_func
        ways["flash-attention, causal and no tree"] = lambda: flash(
            asked, keys, values, softmax_scale=scale, causal=True
        )
    if versions["flashinfer"] and batch == 1:
        prefill = importlib.import_module("flashinfer").single_prefill_with_kv_cache
        mask = torch.cat([tree_mask.new_ones(rows, capacity), tree_mask[0]], dim=-1)
        ways["FlashInfer, masked"] = lambda: prefill(asked[0], keys[0], values[0], custom_mask=mask, sm_scale=scale)
    return ways
