"""Rotated weights: the same model in another basis, in which no number of a row stands out (QuaRot, arXiv 2404.00456).

The residual stream, which all layers read and add to, is multiplied by an orthogonal matrix, and so are the values of
each attention head. Both are folded into the weights: what reads the stream, what is added to it, the embedding, and
maps within it, as transfer layers are. Norms lose their weights to the products that follow them, since a norm without
weights does not see a rotation. In float32 nothing changes but rounding; rows in few bits lose less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ht_export.graph.domains import DOMAIN
from ht_export.quantize.products import Array, Weights, change_product, changed_initializer, stated
from runtime.bindings import GraphDims

# What leaves each number of a row where it is.
STRUCTURE = ("GatherElements", "Slice", "Concat", "Identity")
SEED = 0


class Rotation:
    """An orthogonal matrix [n, n] that is quickly multiplied with: a Kronecker product of two small ones, and signs."""

    def __init__(self, size: int, seed: int = SEED) -> None:
        random = np.random.default_rng([seed, size])
        odd, power = size // (size & -size), size & -size
        inner = min((1 << bit for bit in range(power.bit_length())), key=lambda one: abs(size // one - one))
        self._signs = random.choice(np.array([-1, 1], dtype=np.float32), size)
        self._outer = np.kron(_orthogonal(odd, random), _hadamard(power // inner)).astype(np.float32)
        self._inner = _hadamard(inner)

    def of_columns(self, rows: Array) -> Array:
        """Return rows [..., n] times the matrix."""
        outer, inner = len(self._outer), len(self._inner)
        found = (rows * self._signs).reshape(-1, inner) @ self._inner
        swapped = np.ascontiguousarray(found.reshape(-1, outer, inner).swapaxes(1, 2)).reshape(-1, outer) @ self._outer
        return np.ascontiguousarray(swapped.reshape(-1, inner, outer).swapaxes(1, 2)).reshape(rows.shape)

    def of_rows(self, weights: Array) -> Array:
        """Return the transposed matrix times weights [n, N]."""
        return self.of_columns(weights.T).T


@dataclass
class _Stream:
    """What has to change where the stream is rotated: products that read it behind a norm, those that are added to it,
    and those within it; embeddings and vectors that are added; and norms.
    """

    readers: list[tuple[ir.Node, ir.Node]] = field(default_factory=list)
    writers: list[ir.Node] = field(default_factory=list)
    maps: list[ir.Node] = field(default_factory=list)
    tables: list[tuple[ir.Node, int]] = field(default_factory=list)
    norms: list[ir.Node] = field(default_factory=list)


class _NotRotatableError(Exception):
    """The stream is used in a way that a rotation would change."""


def rotate(graph: ir.Graph, dims: GraphDims) -> bool:
    """Rotate the stream of the portable graph, and the values of its heads, in place; weights are changed when they are
    written. Return False, and change nothing, where a family's layers do not allow it: where norms come before the
    sum, or subtract means.
    """
    try:
        stream = _stream(graph)
    except _NotRotatableError:
        return False
    rotation = Rotation(dims.hidden_size)
    for product, norm in stream.readers:
        weights = stated(norm.inputs[1])
        assert weights is not None
        change_product(graph, product, _reading(rotation, weights))
    for product in stream.writers:
        change_product(graph, product, rotation.of_columns)
    for product in stream.maps:
        change_product(graph, product, lambda found: rotation.of_columns(rotation.of_rows(found)))
    for node, index in stream.tables:
        value = _initializer(node.inputs[index])
        assert value is not None and value.const_value is not None
        shape = tuple(value.const_value.shape.numpy())
        node.replace_input_with(index, changed_initializer(graph, value, rotation.of_columns, shape, node))
    for norm in stream.norms:
        _forget_weights(graph, norm)
    _rotate_values(graph, dims)
    return True


def _reading(rotation: Rotation, weights: Array) -> Callable[[Array], Array]:
    return lambda found: rotation.of_rows(found * weights[:, None])


def _stream(graph: ir.Graph) -> _Stream:
    """Return what reads and writes the residual stream. Raises `_NotRotatableError`."""
    embedding = next((node for node in graph if node.op_type == "Gather" and _is_table(node.inputs[0])), None)
    if embedding is None:
        raise _NotRotatableError
    found = _Stream(tables=[(embedding, 0)])
    inside: set[ir.Value] = set()
    left = [embedding.outputs[0]]
    while left:
        value = left.pop()
        if value in inside:
            continue
        inside.add(value)
        left += [made for use in value.uses() for made in _used(found, use.node, use.idx)]
    for value in inside:
        _check_made(found, value, inside, set())
    return found


def _used(found: _Stream, node: ir.Node, index: int) -> list[ir.Value]:
    """Note what `node` does with the stream; return what of its outputs is stream too."""
    if node.op_type == "RMSNormalization" and index == 0:
        if stated(node.inputs[1]) is None:
            raise _NotRotatableError
        found.norms.append(node)
        for use in node.outputs[0].uses():
            if use.node.op_type != "MatMul" or use.idx or Weights.of(use.node) is None:
                raise _NotRotatableError
            found.readers.append((use.node, node))
        return []
    if node.op_type == "MatMul" and index == 0 and Weights.of(node) is not None:
        found.maps.append(node)
        return [node.outputs[0]]
    if node.op_type == "Shape":
        return []
    if node.op_type == "Add" or (node.op_type in STRUCTURE and (index == 0 or node.op_type == "Concat")):
        return [node.outputs[0]]
    if node.op_type == "Mul" and _is_number(node.inputs[1 - index]):
        return [node.outputs[0]]
    raise _NotRotatableError


def _check_made(found: _Stream, value: ir.Value, inside: set[ir.Value], seen: set[ir.Value]) -> None:
    """Note what is added to make a value of the stream. Raises `_NotRotatableError` where that is none of what it may be."""
    node = value.producer()
    if node is None or value in seen:
        raise _NotRotatableError
    if node.op_type == "Gather" or node.op_type in STRUCTURE:
        sources = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        if node.op_type != "Gather" and not all(source in inside for source in sources):
            raise _NotRotatableError
        return
    if node.op_type == "Mul":
        others = [one for one in node.inputs if not _is_number(one)]
        if len(others) != 1 or others[0] is None:
            raise _NotRotatableError
        if others[0] not in inside:
            _check_made(found, others[0], inside, {*seen, value})
    elif node.op_type == "Add":
        for index, one in enumerate(node.inputs):
            if one is not None and _is_vector(one):
                if (node, index) not in found.tables:
                    found.tables.append((node, index))
            elif one is not None and one not in inside:
                _check_made(found, one, inside, {*seen, value})
    elif node.op_type == "MatMul" and Weights.of(node) is not None:
        if node.inputs[0] not in inside and node not in found.writers:
            found.writers.append(node)
    else:
        raise _NotRotatableError


def _rotate_values(graph: ir.Graph, dims: GraphDims) -> None:
    """Rotate the values of each head where they come from a product and go into one."""
    rotation = Rotation(dims.head_dim)
    for node in list(graph):
        if node.domain != DOMAIN or node.inputs[2] is None:
            continue
        made, used = _values_of(node.inputs[2]), _output_of(node)
        if made is None or used is None:
            continue
        product, columns, bias = made
        change_product(graph, product, _some_columns(rotation, columns, dims.head_dim))
        if bias is not None:
            adding, index = bias
            value = _initializer(adding.inputs[index])
            assert value is not None and value.const_value is not None
            shape = tuple(value.const_value.shape.numpy())
            change = _some_columns(rotation, slice(None), dims.head_dim)
            adding.replace_input_with(index, changed_initializer(graph, value, change, shape, adding))
        change_product(graph, used, _by_head(rotation, dims.head_dim))


def _some_columns(rotation: Rotation, columns: slice, width: int) -> Callable[[Array], Array]:
    def change(found: Array) -> Array:
        found = found.copy()
        part = found[..., columns]
        found[..., columns] = rotation.of_columns(part.reshape(*part.shape[:-1], -1, width)).reshape(part.shape)
        return found

    return change


def _by_head(rotation: Rotation, width: int) -> Callable[[Array], Array]:
    def change(found: Array) -> Array:
        heads = found.reshape(-1, width, found.shape[1])
        return np.concatenate([rotation.of_rows(head) for head in heads])

    return change


def _values_of(value: ir.Value) -> tuple[ir.Node, slice, tuple[ir.Node, int] | None] | None:
    """Return the product that values [B, Hkv, R, D] come from, its columns that they are, and where a bias is added."""
    found: ir.Value | None = value
    for expected in ("Transpose", "Reshape"):
        node = None if found is None else found.producer()
        if node is None or node.op_type != expected:
            return None
        found = node.inputs[0]
    assert found is not None
    node, bias = found.producer(), None
    if node is not None and node.op_type == "Add":
        index = next((index for index, one in enumerate(node.inputs) if _is_vector(one)), None)
        if index is None:
            return None
        bias, found = (node, index), node.inputs[1 - index]
        node = None if found is None else found.producer()
    columns = slice(None)
    if node is not None and node.op_type == "Split":
        sizes = stated(node.inputs[1])
        if sizes is None or node.inputs[0] is None:
            return None
        here = next(index for index, one in enumerate(node.outputs) if one is found)
        start = int(sizes[:here].sum())
        columns = slice(start, start + int(sizes[here]))
        node = node.inputs[0].producer()
    if node is None or node.op_type != "MatMul" or Weights.of(node) is None:
        return None
    return node, columns, bias


def _output_of(attention: ir.Node) -> ir.Node | None:
    """Return the product that reads the output [B, Hq, R, D] of attention, and nothing else does."""
    value = attention.outputs[0]
    for expected in ("Transpose", "Reshape", "MatMul"):
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != expected or uses[0].idx:
            return None
        value = uses[0].node.outputs[0]
    product = value.producer()
    return product if product is not None and Weights.of(product) is not None else None


def _forget_weights(graph: ir.Graph, norm: ir.Node) -> None:
    weights = stated(norm.inputs[1])
    assert weights is not None
    name = f"ones_{len(weights)}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.ones(len(weights), dtype=np.float32), name=name)
        graph.register_initializer(ir.val(name, const_value=tensor))
    norm.replace_input_with(1, graph.initializers[name])


def _initializer(value: ir.Value | None) -> ir.Value | None:
    while value is not None and (producer := value.producer()) is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    return value if value is not None and value.is_initializer() else None


def _is_table(value: ir.Value | None) -> bool:
    found = _initializer(value)
    return found is not None and found.const_value is not None and len(found.const_value.shape) == 2


def _is_vector(value: ir.Value | None) -> bool:
    found = _initializer(value)
    return found is not None and found.const_value is not None and len(found.const_value.shape) == 1


def _is_number(value: ir.Value | None) -> bool:
    found = stated(value)
    return found is not None and found.size == 1


def _orthogonal(size: int, random: np.random.Generator) -> Array:
    return np.linalg.qr(random.standard_normal((size, size)))[0].astype(np.float32)


def _hadamard(size: int) -> Array:
    """Return the Hadamard matrix of a power of two, scaled to be orthogonal."""
    found = np.ones((1, 1))
    while len(found) < size:
        found = np.block([[found, found], [found, -found]])
    return (found / np.sqrt(size)).astype(np.float32)
