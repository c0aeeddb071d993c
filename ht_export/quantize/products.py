"""Products of a graph with its weights, and changes of those that are made when they are written, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ht_export.graph.lazy_weights import HALVES, lazy

Array = NDArray[np.float32]
Change = Callable[[Array], Array]


@dataclass(frozen=True)
class Weights:
    """The weights of a product: an initializer, and whether it is transposed before it, as the head's are where they
    are tied; they may be cast too.
    """

    value: ir.Value
    is_transposed: bool

    @classmethod
    def of(cls, product: ir.Node) -> Weights | None:
        """Return the weights of a `MatMul` where it has any."""
        value, is_transposed = product.inputs[1], False
        while value is not None and (producer := value.producer()) is not None:
            if producer.op_type not in ("Transpose", "Cast"):
                return None
            value, is_transposed = producer.inputs[0], is_transposed or producer.op_type == "Transpose"
        if (
            value is None
            or value.const_value is None
            or not value.is_initializer()
            or len(value.const_value.shape) != 2
        ):
            return None
        return cls(value, is_transposed)

    @property
    def shape(self) -> tuple[int, int]:
        """K inputs and N outputs."""
        assert self.value.const_value is not None
        rows, columns = self.value.const_value.shape.numpy()
        return (columns, rows) if self.is_transposed else (rows, columns)

    def numbers(self) -> Array:
        """Return the weights [K, N]."""
        assert self.value.const_value is not None
        array: Array = self.value.const_value.numpy().astype(np.float32)
        return array.T if self.is_transposed else array


def products(graph: ir.Graph) -> Iterator[tuple[ir.Node, Weights]]:
    """Yield the products with weights."""
    for node in list(graph):
        if node.op_type == "MatMul" and (weights := Weights.of(node)) is not None:
            yield node, weights


def change_product(graph: ir.Graph, product: ir.Node, change: Change) -> None:
    """Let `product` have weights `change`(weights [K, N]); others that share them keep theirs."""
    weights = Weights.of(product)
    assert weights is not None
    changed = changed_initializer(graph, weights.value, lambda _: change(weights.numbers()), weights.shape, product)
    product.replace_input_with(1, changed)


def changed_initializer(
    graph: ir.Graph, value: ir.Value, change: Change, shape: tuple[int, ...], before: ir.Node
) -> ir.Value:
    """Return what stands for `change`(`value`), of this shape, before a node. It is stored in half precision where
    `value` is, and cast.
    """
    found = value.const_value
    assert found is not None
    half = found.dtype in HALVES
    dtype, stored = (ir.DataType.FLOAT16, np.float16) if half else (ir.DataType.FLOAT, np.float32)
    name = _free_name(graph, f"{value.name}.changed")
    tensor = lazy(lambda: change(found.numpy().astype(np.float32)).astype(stored), dtype, shape, name)
    made = ir.val(name, const_value=tensor)
    graph.register_initializer(made)
    if not half:
        return made
    cast = ir.node("Cast", [made], {"to": int(ir.DataType.FLOAT)})
    cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(shape)
    graph.insert_before(before, [cast])
    return cast.outputs[0]


def initializer_of(value: ir.Value | None) -> ir.Value | None:
    """Return the initializer that `value` is, cast or not; None for what is computed."""
    while value is not None and (producer := value.producer()) is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    return value if value is not None and value.is_initializer() and value.const_value is not None else None


def stated(value: ir.Value | None) -> Array | None:
    """Return the numbers of an initializer, cast or not; None for what is computed."""
    value = initializer_of(value)
    if value is None or value.const_value is None:
        return None
    array: Array = value.const_value.numpy().astype(np.float32)
    return array


def _free_name(graph: ir.Graph, name: str) -> str:
    return next(one for one in chain([name], (f"{name}.{n}" for n in count(2))) if one not in graph.initializers)
