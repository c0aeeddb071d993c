"""Attention lowered for the CPU, a node alone: against the function that it was, and against itself with other rows."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnxscript import BOOL, FLOAT, INT64, script
from onnxscript import opset23 as op

from ht_export.graph.lower_cpu import lower_for_cpu
from ht_export.graph.lower_visible import LONG
from ht_export.graph.trace import TreeAttention, WindowedTreeAttention
from runtime.bindings import GraphDims
from runtime.engines.packing import nobodys_rows


@script(default_opset=op)
def heads_apart(
    query: FLOAT[1, 4, "R", 8],  # noqa: F821
    key: FLOAT[1, 2, "R", 8],  # noqa: F821
    value: FLOAT[1, 2, "R", 8],  # noqa: F821
    tree_mask: BOOL[1, "R", "R"],  # noqa: F821
    cache_length: INT64[1],
    key_cache_0: FLOAT[1, 2, "S", 8],  # noqa: F821
    value_cache_0: FLOAT[1, 2, "S", 8],  # noqa: F821
):
    attended = TreeAttention(
        query, key, value, key_cache_0, value_cache_0, cache_length, tree_mask, scale=0.3, softcap=0.0
    )
    logits = op.Mul(attended, attended)
    draft_logits = op.Neg(attended)
    return logits, draft_logits, op.Identity(key), op.Identity(value)


def test_attention_that_nothing_prepares_by_row_is_lowered_too() -> None:
    before = heads_apart.to_model_proto()
    model = ir.serde.deserialize_model(before)
    lower_for_cpu(model, GraphDims(1, 4, 2, 8, 32, 8, (0,)))
    after = ir.serde.serialize_model(model)
    sessions = [onnxruntime.InferenceSession(graph.SerializeToString()) for graph in (before, after)]
    rng = np.random.default_rng(0)
    count, length, capacity = 3, 5, 11
    feed = {
        name: rng.standard_normal((1, heads, rows, 8)).astype(np.float32)
        for name, heads, rows in (
            ("query", 4, count),
            ("key", 2, count),
            ("value", 2, count),
            ("key_cache_0", 2, capacity),
            ("value_cache_0", 2, capacity),
        )
    }
    feed |= {"tree_mask": np.array([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=bool), "cache_length": np.array([length])}
    expected = sessions[0].run(None, feed)
    found = sessions[1].run(None, feed | nobodys_rows(1))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for cache, new, name in zip(found[2:], ("key", "value"), ("key_cache_0", "value_cache_0"), strict=True):
        np.testing.assert_array_equal(cache[:, :, :length], feed[name][:, :, :length])
        np.testing.assert_array_equal(cache[:, :, length : length + count], feed[new])


@script(default_opset=op)
def windowed_and_capped(
    query: FLOAT["B", 4, "R", 8],  # noqa: F821
    key: FLOAT["B", 2, "R", 8],  # noqa: F821
    value: FLOAT["B", 2, "R", 8],  # noqa: F821
    tree_mask: BOOL["B", "R", "R"],  # noqa: F821
    cache_length: INT64["B"],  # noqa: F821
    first_visible: INT64["B", "R"],  # noqa: F821
    key_cache_0: FLOAT["B", 2, "S", 8],  # noqa: F821
    value_cache_0: FLOAT["B", 2, "S", 8],  # noqa: F821
):
    attended = WindowedTreeAttention(
        query, key, value, key_cache_0, value_cache_0, cache_length, tree_mask, first_visible, scale=0.3, softcap=2.0
    )
    logits = op.Mul(attended, attended)
    draft_logits = op.Neg(attended)
    return logits, draft_logits, op.Identity(key), op.Identity(value)


@pytest.mark.parametrize("lengths", [[9], [LONG + 30], [9, 4], [LONG + 30, LONG + 9]])
def test_windows_and_soft_caps_after_short_and_long_contexts(lengths: list[int]) -> None:
    before = windowed_and_capped.to_model_proto()
    model = ir.serde.deserialize_model(before)
    lower_for_cpu(model, GraphDims(1, 4, 2, 8, 32, 8, (0,)))
    after = ir.serde.serialize_model(model)
    sessions = [onnxruntime.InferenceSession(graph.SerializeToString()) for graph in (before, after)]
    rng = np.random.default_rng(0)
    slots, length = len(lengths), np.array(lengths)
    count = 3 if slots == 1 else 1
    capacity = max(lengths) + 50
    feed = {
        name: 3 * rng.standard_normal((slots, heads, rows, 8)).astype(np.float32)
        for name, heads, rows in (
            ("query", 4, count),
            ("key", 2, count),
            ("value", 2, count),
            ("key_cache_0", 2, capacity),
            ("value_cache_0", 2, capacity),
        )
    }
    mask = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=bool)[:count, :count]
    feed |= {"tree_mask": np.repeat(mask[None], slots, 0), "cache_length": length}
    feed["first_visible"] = length[:, None] - np.array([7, 3, 2])[:count]
    expected = sessions[0].run(None, feed)
    found = sessions[1].run(None, feed | nobodys_rows(slots))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("length", [LONG, LONG + 126, LONG + 255])
def test_a_row_after_a_long_context_attends_as_it_does_alone_bit_by_bit(length: int) -> None:
    """Rows of a chain are in the places that they have in plain decoding, whatever room there is behind them."""
    model = ir.serde.deserialize_model(heads_apart.to_model_proto())
    lower_for_cpu(model, GraphDims(1, 4, 2, 8, 32, 8, (0,)))
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    rng = np.random.default_rng(0)
    count = 4
    new = {
        name: rng.standard_normal((1, heads, count, 8)).astype(np.float32)
        for name, heads in (("query", 4), ("key", 2), ("value", 2))
    }
    names = ("key_cache_0", "value_cache_0")
    caches = {name: rng.standard_normal((1, 2, length + 10, 8)).astype(np.float32) for name in names}

    def attended(first: int, rows: int, caches: dict[str, np.ndarray]) -> list[np.ndarray]:
        feed = {name: value[:, :, first : first + rows] for name, value in new.items()} | caches
        feed |= {"tree_mask": np.tri(rows, dtype=bool)[None], "cache_length": np.array([length + first])}
        return session.run(None, feed | nobodys_rows(1))

    together, _, *_ = attended(0, count, caches)
    for row in range(count):
        alone, _, *grown = attended(row, 1, caches)
        np.testing.assert_array_equal(alone[:, :, 0], together[:, :, row])
        caches = {
            name: np.pad(cache, ((0, 0), (0, 0), (0, 64), (0, 0))) for name, cache in zip(names, grown, strict=True)
        }
