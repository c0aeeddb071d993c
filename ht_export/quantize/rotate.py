"""Rotated weights: the same model in another basis, in which no number of a row stands out (QuaRot, arXiv 2404.00456).

The residual stream, which all layers read and add to, is multiplied by an orthogonal matrix, which is folded into the
weights: of what reads the stream, what is added to it, the embedding, and maps within it, as transfer layers are. Norms
lose their weights to the products that follow them, since a norm without weights does not see a rotation. In float32
nothing changes but rounding; rows in few bits lose less.

Rows behind such a norm are alike: their root mean square is 1, and their numbers lie about as those of a normal
distribution do. So it is known beforehand how large they become.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ht_export.quantize.products import Array, Weights, change_product, changed_initializer, initializer_of, stated

# What leaves each number of a row where it is.
STRUCTURE = ("GatherElements", "Slice", "Concat", "Identity")
SEED = 0
# What a norm is marked with whose rows are alike.
ALIKE = "ht.rows_alike"


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


def rotate(graph: ir.Graph, hidden_size: int) -> bool:
    """Rotate the stream of the portable graph in place; weights are changed when they are written. Return False, and
    change nothing, where a family's layers do not allow it: where norms come before the sum, or subtract means.
    """
    try:
        stream = _stream(graph)
    except _NotRotatableError:
        return False
    rotation = Rotation(hidden_size)
    for product, norm in stream.readers:
        weights = stated(norm.inputs[1])
        assert weights is not None
        change_product(graph, product, _reading(rotation, weights))
    for product in stream.writers:
        change_product(graph, product, rotation.of_columns)
    for product in stream.maps:
        change_product(graph, product, lambda found: rotation.of_columns(rotation.of_rows(found)))
    for node, index in stream.tables:
        value = initializer_of(node.inputs[index])
        assert value is not None and value.const_value is not None
        shape = tuple(value.const_value.shape.numpy())
        node.replace_input_with(index, changed_initializer(graph, value, rotation.of_columns, shape, node))
    for norm in stream.norms:
        _forget_weights(graph, norm)
        norm.metadata_props[ALIKE] = "true"
    return True


def behind_a_layers_norm(rows: ir.Value) -> bool:
    """Return whether these are the rows of a rotated stream that a layer reads. The last norm, before the head, is not
    a layer's: nothing is added to its stream any more.
    """
    norm = rows.producer()
    if norm is None or ALIKE not in norm.metadata_props:
        return False
    stream = norm.inputs[0]
    return stream is not None and len(stream.uses()) > 1


def _reading(rotation: Rotation, weights: Array) -> Callable[[Array], Array]:
    return lambda found: rotation.of_rows(found * weights[:, None])


def _stream(graph: ir.Graph) -> _Stream:
    """Return what reads and writes the residual stream. Raises `_NotRotatableError`."""
    embedding = next((node for node in graph if node.op_type == "Gather" and _is_table(node.inputs[0])), None)
    if embedding is None:
        raise _NotRotatableError
    found = _Stream(tables=[(embedding, 0)])
    # In the order of the graph, so that the same weights get the same names every time.
    inside: dict[ir.Value, None] = {}
    left = [embedding.outputs[0]]
    while left:
        value = left.pop()
        if value in inside:
            continue
        inside[value] = None
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


def _check_made(found: _Stream, value: ir.Value, inside: Container[ir.Value], seen: set[ir.Value]) -> None:
    """Note what is added to make a value of the stream. Raises `_NotRotatableError` for what it may not be."""
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


def _forget_weights(graph: ir.Graph, norm: ir.Node) -> None:
    weights = stated(norm.inputs[1])
    assert weights is not None
    name = f"ones_{len(weights)}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.ones(len(weights), dtype=np.float32), name=name)
        graph.register_initializer(ir.val(name, const_value=tensor))
    norm.replace_input_with(1, graph.initializers[name])


def _is_table(value: ir.Value | None) -> bool:
    found = initializer_of(value)
    return found is not None and found.const_value is not None and len(found.const_value.shape) == 2


def _is_vector(value: ir.Value | None) -> bool:
    found = stated(value)
    # A single number that is added to all of a row is no part of a rotated one.
    return found is not None and found.ndim == 1 and found.size > 1


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
