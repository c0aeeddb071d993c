"""Rewrites of the traced graph into operators that engines have kernels for."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnxscript.rewriter import MatchResult, RewritePass, RewriteRuleClassBase, RewriteRuleSet, onnx_fusions


def use_fused_operators(model: ir.Model) -> None:
    """Put `RMSNormalization` and `RotaryEmbedding` (opset 23) in the place of what the tracer writes out for them."""
    onnx_fusions.fuse(model)
    RewritePass(RewriteRuleSet([RotaryFusion.rule()]))(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)


class RotaryFusion(RewriteRuleClassBase):
    """`x * cos + rotate_half(x) * sin`, the form of `transformers`, to `RotaryEmbedding`.

    The operator takes cosines and sines of half the width; both halves are equal where they come from
    `cat(frequencies, frequencies)`, and only there the rule applies.
    """

    def pattern(
        self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, middle: ir.Value, end: ir.Value, step: ir.Value
    ) -> ir.Value:
        """Return what is replaced; x is [B, H, R, D], cos and sin are [B, 1, R, D] and shared by queries and keys."""
        first = op.Slice(x, [0], middle, [3], step)
        second = op.Slice(x, middle, end, [3], step)
        rotated = op.Concat(op.Neg(second), first, axis=-1)
        return op.Add(op.Mul(x, cos), op.Mul(rotated, sin))

    def check(self, context: Any, cos: ir.Value, sin: ir.Value, middle: ir.Value, **_: Any) -> MatchResult:
        """Accept only when both halves of cos and sin are the same."""
        result = MatchResult()
        if len(_constant(middle)) != 1 or not (_has_equal_halves(cos) and _has_equal_halves(sin)):
            return result.fail("cosines and sines do not come from cat(frequencies, frequencies)")
        return result

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, middle: ir.Value, **_: Any) -> ir.Value:
        """Return the replacement."""
        zero, half, last = (op.Constant(value_ints=[n]) for n in (0, _constant(middle)[0], 2))
        halves = [op.Slice(op.Squeeze(value, op.Constant(value_ints=[1])), zero, half, last) for value in (cos, sin)]
        return op.RotaryEmbedding(x, *halves, interleaved=0)


def _has_equal_halves(value: ir.Value) -> bool:
    """Follow what keeps equal halves equal (a new axis, fewer rows, cosine or sine, a scale, a cast) to the Concat.

    `value` is [B, 1, R, D].
    """
    node = value.producer()
    if node is None or node.op_type != "Unsqueeze" or node.inputs[1] is None or _constant(node.inputs[1]) != [1]:
        return False
    while node is not None and node.op_type in ("Unsqueeze", "Slice", "Cos", "Sin", "Mul", "Cast"):
        if node.op_type == "Slice" and (node.inputs[3] is None or _constant(node.inputs[3]) != [1]):
            return False
        if node.op_type == "Mul" and (node.inputs[1] is None or len(_constant(node.inputs[1])) != 1):
            return False
        assert node.inputs[0] is not None
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]


def _constant(value: ir.Value) -> list[Any]:
    tensor = ir.convenience.get_const_tensor(value)
    return [] if tensor is None else tensor.numpy().reshape(-1).tolist()
