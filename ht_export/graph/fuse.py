"""Rewrites of the traced graph into operators that engines have kernels for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    OutputFixPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import MatchResult, RewritePass, RewriteRuleClassBase, RewriteRuleSet, onnx_fusions

from ht_export.graph.lazy_weights import joined


def simplify(model: ir.Model) -> None:
    """Fold constants, compute everything once, and leave out what nothing uses.

    These are the steps of `onnxscript.optimizer.optimize` without its rewrite rules, which took a third of an export's
    time to find seven nodes of 1,546, and of which one takes a norm's small epsilon for 0.
    """
    fold_constants(model)
    for simplification in (
        RemoveUnusedNodesPass(),
        RemoveUnusedFunctionsPass(),
        RemoveUnusedOpsetsPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateInitializersPass(),
        CommonSubexpressionEliminationPass(),
        OutputFixPass(),
        NameFixPass(),
    ):
        simplification(model)


def use_fused_operators(model: ir.Model) -> None:
    """Put `RMSNormalization` and `RotaryEmbedding` (opset 23) in the place of what the tracer writes out for them, and
    one matrix product in the place of several of the same rows (queries, keys and values; gate and up).
    """
    onnx_fusions.fuse(model)
    RewritePass(RewriteRuleSet([RotaryFusion.rule()]))(model)
    CommonSubexpressionEliminationPass()(model)
    _normalise_in_one_precision(model.graph)
    _merge_projections(model.graph)
    _state_reshapes(model.graph)
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


def _normalise_in_one_precision(graph: ir.Graph) -> None:
    """Where weights of a normalisation are in float32 and rows in half precision, normalise in float32.

    The operator gives what it computes the type of its weights, and few runtimes have it for two types. The fusion
    takes some of the casts around it away.
    """
    for node in list(graph):
        rows, weights = (node.inputs[0], node.inputs[1]) if node.op_type == "RMSNormalization" else (None, None)
        if rows is None or weights is None or weights.dtype is None or rows.dtype == weights.dtype:
            continue
        output = node.outputs[0]
        wanted = output.dtype or weights.dtype
        widened = ir.node("Cast", [rows], {"to": int(weights.dtype)})
        normed = ir.node("RMSNormalization", [widened.outputs[0], weights], dict(node.attributes))
        narrowed = ir.node("Cast", [normed.outputs[0]], {"to": int(wanted)})
        for made, dtype in ((widened, weights.dtype), (normed, weights.dtype), (narrowed, wanted)):
            made.outputs[0].dtype, made.outputs[0].shape = dtype, output.shape
        graph.insert_before(node, [widened, normed, narrowed])
        ir.convenience.replace_all_uses_with(output, narrowed.outputs[0])
        graph.remove(node, safe=True)


def _merge_projections(graph: ir.Graph) -> None:
    """Multiply rows by all weights that they meet in one product, and split the result.

    A pass over few rows is bound by reading weights; fewer and larger products come closer to the memory's speed.
    """
    by_input: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "MatMul" and node.inputs[0] is not None and _weight(node) is not None:
            by_input.setdefault(node.inputs[0], []).append(node)
    for rows, nodes in by_input.items():
        weights = [weight for node in nodes if (weight := _weight(node)) is not None]
        if len(nodes) == 1 or len({(weight.shape.numpy()[0], weight.dtype) for weight in weights}) > 1:
            continue
        old = [node.inputs[1] for node in nodes]
        name = "+".join(str(value.name) for value in old if value is not None)
        merged = _register(graph, name, joined(weights, name))
        columns = np.array([weight.shape.numpy()[1] for weight in weights], dtype=np.int64)
        sizes = _initializer(graph, f"{name}.sizes", columns)
        product = ir.node("MatMul", [rows, merged])
        split = ir.node("Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=len(nodes))
        graph.insert_before(nodes[0], [product, split])
        for node, part in zip(nodes, split.outputs, strict=True):
            part.type, part.shape = node.outputs[0].type, node.outputs[0].shape
            ir.convenience.replace_all_uses_with(node.outputs[0], part)
            graph.remove(node, safe=True)
        for value in old:
            if value is not None and not value.uses() and value.name is not None:
                graph.initializers.pop(value.name, None)


def _state_reshapes(graph: ir.Graph) -> None:
    """Give each reshape its sizes as constants, 0 standing for a leading dimension that stays as it is.

    The tracer computes them from the shapes of other tensors and leaves one to be inferred. TensorRT's parser loses
    track of the number of heads that way.
    """
    constants: dict[tuple[int, ...], ir.Value] = {}
    for node in graph:
        if node.op_type != "Reshape" or node.inputs[0] is None:
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if before is None or after is None:
            continue
        sizes = tuple(
            size if isinstance(size, int) else 0 if i < len(before) and before[i] == size else -1
            for i, size in enumerate(after)
        )
        if -1 in sizes:
            continue
        if sizes not in constants:
            name = "sizes_" + "_".join(map(str, sizes))
            constants[sizes] = _initializer(graph, name, np.array(sizes, dtype=np.int64))
        node.replace_input_with(1, constants[sizes])
        node.attributes.pop("allowzero", None)


def _weight(node: ir.Node) -> ir.TensorProtocol | None:
    """Return the second factor of a product when it is a matrix of weights."""
    value = node.inputs[1]
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value if len(value.const_value.shape) == 2 else None


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    return _register(graph, name, ir.tensor(np.ascontiguousarray(array), name=name))


def _register(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.val(name, const_value=tensor)
    graph.register_initializer(value)
    return value


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
