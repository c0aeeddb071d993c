"""Tree attention as Triton kernels; what they compute is defined by `plugins.reference.tree_attention`.

All query heads that share a key/value head are packed into one list of rows, so that a tile of keys and values is read
once for the whole group. A program takes BLOCK_M of these rows over a part of the cache (flash-decoding: few rows leave
a GPU idle unless the cache is split among programs), then over the new rows under the tree mask, with an online softmax
in float32. Where the cache is split, `combine_kernel` joins the parts.

Only the valid prefix of the cache is ever read: its length is on the device, so one grid serves all lengths. Where a
window hides the beginning of the cache from all rows of a program, that is not read either.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _attend(q, keys, values, visible, columns, in_columns, d, in_d, row_max, row_sum, acc, scale, cap, D: tl.constexpr,
            CAPPED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Take the keys and values at `columns` into the running softmax of the rows q."""
    k = tl.load(keys + columns[None, :] * D + d[:, None], mask=in_columns[None, :] & in_d[:, None], other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
    scores = tl.dot(q, k) * scale
    if CAPPED:
        # tanh(x) is 1 - 2 / (exp(2 x) + 1); `scale` has what makes x of it, for exp2.
        scores = cap - 2 * cap / (tl.exp2(scores) + 1)
    scores = tl.where(visible, scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row that has seen nothing yet has no maximum: any finite number in its place leaves all weights zero.
    finite = tl.where(new_max == -float("inf"), 0.0, new_max)
    weights = tl.exp2(scores - finite[:, None])
    kept = tl.exp2(row_max - finite)
    v = tl.load(values + columns[:, None] * D + d[None, :], mask=in_columns[:, None] & in_d[None, :], other=0.0)
    if UPCAST:
        v = v.to(tl.float32)
    acc = acc * kept[:, None] + tl.dot(weights.to(v.dtype), v)
    return new_max, row_sum * kept + tl.sum(weights, 1), acc


@triton.jit
def attention_kernel(
    query,  # [B, Hkv, G * R, D]: [B, Hq, R, D] seen by key/value head
    key_new,  # [B, Hkv, R, D]
    value_new,
    key_cache,  # [B, Hkv, S, D]
    value_cache,
    cache_length,  # int64 [B]
    tree_mask,  # bool [B, R, R]
    first_visible,  # int64 [B, R], with WINDOWED only
    output,  # as query; with SPLIT float32 [B, Hkv, splits, G * R, D], not yet divided by the sums
    maxima,  # float32 [B, Hkv, splits, G * R], with SPLIT only
    sums,
    scale,  # of the scores, times log2(e); with CAPPED times 2 log2(e) over the soft cap
    cap,  # the soft cap, times log2(e), with CAPPED only
    kv_heads,
    rows,  # R
    packed_rows,  # G * R
    capacity,  # S
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,  # for Triton's interpreter, whose products of bfloat16 are wrong
):
    """Grid: (blocks of packed rows, B * Hkv, splits)."""
    head = tl.program_id(1).to(tl.int64)
    batch = head // kv_heads
    split = tl.program_id(2)
    packed = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = packed < packed_rows
    row = packed % rows
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    offsets = (head * packed_rows + packed[:, None]) * D + d[None, :]
    q = tl.load(query + offsets, mask=in_rows[:, None] & in_d[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    first = 0
    # Within the cache whatever it says: while a plan is built, TensorRT may run this on any numbers to time it.
    last = tl.minimum(tl.maximum(tl.load(cache_length + batch), 0), capacity).to(tl.int32)
    if WINDOWED:
        row_first = tl.load(first_visible + batch * rows + row, mask=in_rows, other=capacity).to(tl.int32)
        first = tl.minimum(tl.maximum(tl.min(row_first, 0), 0), last)
    if SPLIT:
        part = tl.cdiv(tl.cdiv(last - first, tl.num_programs(2)), BLOCK_N) * BLOCK_N
        first += split * part
        last = tl.minimum(first + part, last)
    keys = key_cache + head * capacity * D
    values = value_cache + head * capacity * D
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        in_columns = columns < last
        visible = in_columns[None, :] & in_rows[:, None]
        if WINDOWED:
            visible = visible & (columns[None, :] >= row_first[:, None])
        row_max, row_sum, acc = _attend(
            q, keys, values, visible, columns, in_columns, d, in_d, row_max, row_sum, acc, scale, cap, D, CAPPED, UPCAST
        )
    if split == 0:
        keys = key_new + head * rows * D
        values = value_new + head * rows * D
        mask = tree_mask + (batch * rows + row[:, None]) * rows
        for start in range(0, rows, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            in_columns = columns < rows
            within = in_columns[None, :] & in_rows[:, None]
            visible = tl.load(mask + columns[None, :], mask=within, other=0) != 0
            row_max, row_sum, acc = _attend(
                q, keys, values, visible, columns, in_columns, d, in_d, row_max, row_sum, acc, scale, cap, D, CAPPED,
                UPCAST,
            )  # fmt: skip
    if SPLIT:
        base = (head * tl.num_programs(2) + split) * packed_rows + packed
        tl.store(maxima + base, row_max, mask=in_rows)
        tl.store(sums + base, row_sum, mask=in_rows)
        tl.store(output + base[:, None] * D + d[None, :], acc, mask=in_rows[:, None] & in_d[None, :])
    else:
        result = acc / row_sum[:, None]
        tl.store(output + offsets, result.to(output.dtype.element_ty), mask=in_rows[:, None] & in_d[None, :])


@triton.jit
def combine_kernel(
    partial,  # float32 [B, Hkv, splits, G * R, D]
    maxima,  # float32 [B, Hkv, splits, G * R]
    sums,
    output,  # [B, Hkv, G * R, D]
    packed_rows,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Grid: (packed rows, B * Hkv). Split 0 of every row has seen the row itself, so that no sum is zero."""
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    d = tl.arange(0, BLOCK_D)
    base = (head * splits + split) * packed_rows + row
    row_max = tl.load(maxima + base, mask=split < splits, other=-float("inf"))
    row_sum = tl.load(sums + base, mask=split < splits, other=0.0)
    weights = tl.exp2(row_max - tl.max(row_max, 0))
    used = (weights > 0)[:, None] & (d < D)[None, :]
    parts = tl.load(partial + base[:, None] * D + d[None, :], mask=used, other=0.0)
    result = tl.sum(parts * weights[:, None], 0) / tl.sum(row_sum * weights, 0)
    tl.store(output + (head * packed_rows + row) * D + d, result.to(output.dtype.element_ty), mask=d < D)


@triton.jit
def commit_rows_kernel(
    sources,  # int64 [N]: addresses of N arrays of new keys or values, [B, Hkv, rows, D]
    targets,  # int64 [N]: addresses of their caches, [places, Hkv, S, D]
    source_rows,  # int32 [N]
    lengths,  # int64 [B]: rows of the cache that are valid already
    accepted,  # int32 [B, most]: rows to copy, in order
    counts,  # int32 [B]: how many of them, 0 to `most`
    first,  # the place of request 0; the others' are those after it
    most,
    capacity,  # S
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    """Copy the accepted rows of every request behind its valid ones. Grid: (B * most, Hkv, N)."""
    index = tl.program_id(0) % most
    # Caches of many requests have more elements than 32 bits count.
    request = (tl.program_id(0) // most).to(tl.int64)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    array = tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    # Nothing of what lies behind a request's own accepted rows.
    copied = d < tl.where(index < tl.load(counts + request), D, 0)
    source = tl.load(sources + array).to(tl.pointer_type(ELEMENT))
    target = tl.load(targets + array).to(tl.pointer_type(ELEMENT))
    row = tl.load(accepted + request * most + index)
    end = tl.load(lengths + request)
    values = tl.load(source + ((request * heads + head) * tl.load(source_rows + array) + row) * D + d, mask=copied)
    tl.store(target + (((first + request) * heads + head) * capacity + end + index) * D + d, values, mask=copied)
