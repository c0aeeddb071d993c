"""Building parts of a graph: nodes one after the other, and choices between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir


class Nodes:
    """Appends nodes: before another one of a graph, or to a list that becomes a branch of an `If`."""

    def __init__(self, name: str, append: Callable[[ir.Node], None], constant: Callable[..., ir.Value]) -> None:
        self._name = name
        self._append = append
        self.constant = constant
        self._count = 0

    def add(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        outputs: int = 1,
        domain: str = "",
    ) -> list[ir.Value]:
        """Append a node; return its outputs, named as no others in the graph or its branches are."""
        self._count += 1
        names = [f"{self._name}_{self._count}_{index}" for index in range(outputs)]
        node = ir.node(operator, inputs, attributes or {}, domain=domain, outputs=[ir.val(name) for name in names])
        self._append(node)
        return list(node.outputs)

    def one(
        self, operator: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any] | None = None
    ) -> ir.Value:
        """Append a node with one output; return that."""
        return self.add(operator, inputs, attributes)[0]

    def choose(
        self, condition: ir.Value, yes: Callable[[Nodes], list[ir.Value]], no: Callable[[Nodes], list[ir.Value]]
    ) -> list[ir.Value]:
        """Append an `If`: what `yes` or `no` returns, by `condition`; return its outputs."""
        self._count += 1
        branches = {}
        kinds: list[ir.Value] = []
        for name, make in (("then_branch", yes), ("else_branch", no)):
            nodes: list[ir.Node] = []
            kinds = make(Nodes(f"{self._name}_{self._count}_{name[:4]}", nodes.append, self.constant))
            branches[name] = ir.Graph([], kinds, nodes=nodes, name=f"{self._name}_{self._count}_{name}")
        self._count -= 1
        found = self.add("If", [condition], branches, outputs=len(kinds))
        for value, kind in zip(found, kinds, strict=True):
            value.type, value.shape = kind.type, kind.shape
        return found


def typed(value: ir.Value, dtype: ir.DataType, rank: int) -> ir.Value:
    """State the type and the rank of an output of a branch."""
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape([None] * rank)
    return value
