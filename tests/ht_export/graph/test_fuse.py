"""The rotary rewrite on graphs written by hand: where it applies, and where it must not."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnxscript import FLOAT, script
from onnxscript import opset23 as op

from ht_export.graph.fuse import use_fused_operators


@script(default_opset=op)
def rotary(x: FLOAT["B", 2, "R", 4], frequencies: FLOAT["B", "R", 2]) -> FLOAT["B", 2, "R", 4]:  # noqa: F821
    angles = op.Concat(frequencies, frequencies, axis=-1)
    cos = op.Unsqueeze(op.Cos(angles), [1])
    sin = op.Unsqueeze(op.Sin(angles), [1])
    first = op.Slice(x, [0], [2], [3], [1])
    second = op.Slice(x, [2], [9223372036854775807], [3], [1])
    rotated = op.Concat(op.Neg(second), first, axis=-1)
    return op.Add(op.Mul(x, cos), op.Mul(rotated, sin))


@script(default_opset=op)
def halves_that_differ(x: FLOAT["B", 2, "R", 4], frequencies: FLOAT["B", "R", 2]) -> FLOAT["B", 2, "R", 4]:  # noqa: F821
    angles = op.Concat(frequencies, op.Neg(frequencies), axis=-1)
    cos = op.Unsqueeze(op.Cos(angles), [1])
    sin = op.Unsqueeze(op.Sin(angles), [1])
    first = op.Slice(x, [0], [2], [3], [1])
    second = op.Slice(x, [2], [9223372036854775807], [3], [1])
    rotated = op.Concat(op.Neg(second), first, axis=-1)
    return op.Add(op.Mul(x, cos), op.Mul(rotated, sin))


@pytest.mark.parametrize(("function", "fused"), [(rotary, True), (halves_that_differ, False)])
def test_rotary_embedding_is_used_where_it_means_the_same(function: Any, fused: bool) -> None:
    before = function.to_model_proto()
    model = ir.serde.deserialize_model(before)
    use_fused_operators(model)
    after = ir.serde.serialize_model(model)
    onnx.checker.check_model(after)
    assert any(node.op_type == "RotaryEmbedding" for node in after.graph.node) == fused
    rng = np.random.default_rng(0)
    names = [value.name for value in before.graph.input]
    shapes = ((2, 2, 3, 4), (2, 3, 2))
    feed = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in zip(names, shapes, strict=True)}
    expected = ReferenceEvaluator(before).run(None, feed)[0]
    np.testing.assert_allclose(ReferenceEvaluator(after).run(None, feed)[0], expected, atol=1e-6)
