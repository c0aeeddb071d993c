"""The graph of an engine without some of its blocks: the draft of self-speculative decoding, over the same weights.

A block adds to the stream, so it is left out by taking the stream before the sum for the sum. A layer that does not
attend has no part in the cache: the graph is that of a model with as many layers as attend.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ht_export.graph.domains import DOMAIN
from ht_export.model.blocks import Blocks
from runtime.bindings import GraphDims
from runtime.errors import InputError


def skip_blocks(model: ir.Model, dims: GraphDims, blocks: Blocks) -> GraphDims:
    """Leave `blocks` out of the portable graph `model` of `dims`, in place; return the dimensions that it has then.

    Raises `InputError` for blocks that there are not, and for a graph in which they are not found.
    """
    blocks.check(dims.num_layers)
    graph = model.graph
    attentions = [node for node in graph if node.domain == DOMAIN]
    if len(attentions) != dims.num_layers:
        raise InputError(
            f"the graph has {len(attentions)} attention nodes for {dims.num_layers} layers; export it again"
        )
    # Before anything is changed: one is found by the other.
    sums = [_sums(node, layer) for layer, node in enumerate(attentions)]
    of_caches = 2 * dims.num_layers
    caches, new = list(graph.inputs)[-of_caches:], list(graph.outputs)[-of_caches:]
    for layer, (attention, mlp) in enumerate(sums):
        for left_out, (total, stream) in ((blocks.attention, attention), (blocks.mlp, mlp)):
            if layer in left_out:
                # The stream may be a sum that was left out before: then it is what that was replaced by.
                source = total.inputs[stream]
                assert source is not None
                ir.convenience.replace_all_uses_with(total.outputs[0], source)
    kept = blocks.kept_attention(dims.num_layers)
    places = [*kept, *(dims.num_layers + layer for layer in kept)]
    # Bindings of the cache come last: keys by layer, then values.
    others = list(graph.outputs)[:-of_caches]
    graph.outputs.clear()
    graph.outputs.extend([*others, *(new[place] for place in places)])
    RemoveUnusedNodesPass()(model)
    inputs = list(graph.inputs)[:-of_caches]
    graph.inputs.clear()
    graph.inputs.extend([*inputs, *(caches[place] for place in places)])
    joins = tuple(sum(layer < join for layer in kept) for join in dims.transfer_layers)
    found = replace(dims, num_layers=len(kept), transfer_layers=joins)
    for values, bindings in ((graph.inputs, found.inputs()), (graph.outputs, found.outputs())):
        for value, binding in zip(values, bindings, strict=True):
            value.name, value.shape = binding.name, ir.Shape(binding.shape)
    return found


def _sums(attention: ir.Node, layer: int) -> tuple[tuple[ir.Node, int], tuple[ir.Node, int]]:
    """Return the sums that add the attention and the MLP of a layer to the stream, and which input of them that is."""
    # What attention makes goes one way until it is added: through its projection, for some a norm or a factor.
    value = attention.outputs[0]
    while True:
        uses = list(value.uses())
        if len(uses) != 1:
            raise _not_found(layer, "attention")
        node, index = uses[0].node, uses[0].idx
        value = node.outputs[0]
        if node.op_type == "Add" and _is_computed(node.inputs[1 - index]):
            break
    of_attention = node, 1 - index
    for use in node.outputs[0].uses():
        if use.node.op_type == "Add" and _is_computed(use.node.inputs[1 - use.idx]):
            return of_attention, (use.node, use.idx)
    raise _not_found(layer, "MLP")


def _is_computed(value: ir.Value | None) -> bool:
    return value is not None and not value.is_initializer() and value.producer() is not None


def _not_found(layer: int, kind: str) -> InputError:
    return InputError(f"the {kind} of layer {layer} is not found in the graph; self-speculative decoding needs another")
