"""The meaning of tree attention, in numpy. Every implementation is tested against this one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def tree_attention(
    query: NDArray,
    key_new: NDArray,
    value_new: NDArray,
    key_cache: NDArray,
    value_cache: NDArray,
    cache_length: NDArray[np.int64],
    tree_mask: NDArray[np.bool_],
    scale: float,
    first_visible: NDArray[np.int64] | None = None,
    softcap: float = 0.0,
) -> NDArray:
    """Attend from R rows to the valid prefix of the cache, and to those of the R rows that `tree_mask` lets each see.

    query [B, Hq, R, D]; key_new, value_new [B, Hkv, R, D]; key_cache, value_cache [B, Hkv, S, D], of which the
    first cache_length[b] rows are valid; tree_mask [B, R, R], every row sees itself; of the cache, row r sees rows from
    first_visible[b, r] on only. Head h of the queries reads head h // (Hq / Hkv) of keys and values. With a `softcap`
    c, scores s become c tanh(s / c). Returns [B, Hq, R, D]; the arithmetic is done in float64.
    """
    batch, query_heads, rows, head_dim = query.shape
    group = query_heads // key_new.shape[1]
    output = np.empty((batch, query_heads, rows, head_dim), dtype=query.dtype)
    for b in range(batch):
        length = int(cache_length[b])
        keys = np.concatenate([key_cache[b, :, :length], key_new[b]], axis=1).astype(np.float64)
        values = np.concatenate([value_cache[b, :, :length], value_new[b]], axis=1).astype(np.float64)
        first = np.zeros(rows, dtype=np.int64) if first_visible is None else first_visible[b]
        visible = np.concatenate([np.arange(length) >= first[:, None], tree_mask[b]], axis=1)
        for head in range(query_heads):
            scores = query[b, head].astype(np.float64) @ keys[head // group].T * scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            scores = np.where(visible, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            output[b, head] = weights @ values[head // group]
    return output
