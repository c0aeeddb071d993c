"""Decoder layers, traced once for each kind of them and stamped wherever a layer of that kind is.

Tracing a layer takes a second or more, and models have dozens that differ in their weights alone. The model is traced
with an opaque node in the place of each run of layers of one kind, which is then replaced by copies of that kind's
nodes. So the time hardly grows with depth.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ht_export.graph.domains import DOMAIN, DOMAIN_VERSION
from ht_export.model.attention import AttentionRows, LayerAttention
from ht_export.model.families import decoder_parts, head_dim
from ht_export.model.reference import HiddenTransferModel, TreeAttention, TreeRows

# Traces a module with these inputs, whose sizes are named, to a model.
Trace = Callable[[nn.Module, tuple[Tensor, ...], tuple[dict[int, Any], ...]], ir.Model]

OPAQUE = "TracedLayer"
# Sizes that all differ, so that the tracer cannot take two for one.
BATCH, ROWS, CAPACITY = 2, 5, 7
# What tells where a layer is, and nothing of what it computes.
PLACE = "layer_idx"


@dataclass(frozen=True)
class Kind:
    """A kind of layers: its graph, whose weights are named as within the layer, and how it attends."""

    model: ir.Model
    attention: LayerAttention

    def cache(self, layer: int) -> list[ir.Value]:
        """Return new inputs of a graph: key and value cache of a layer of this kind."""
        return [
            ir.Value(name=f"{given.name}_{layer}", shape=given.shape, type=given.type)
            for given in self.model.graph.inputs[3:5]
        ]


class _OneLayer(nn.Module):
    """A layer as a function of tensors: to the states after it, and the keys and values of its rows."""

    def __init__(self, layer: nn.Module, attention: TreeAttention, tell: Callable[[LayerAttention], None]) -> None:
        super().__init__()
        self.layer = layer
        self._attention = attention
        # An attribute that is set while it is traced would be as before afterwards.
        self._tell = tell

    def forward(
        self,
        hidden: Tensor,
        cosines: Tensor,
        sines: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cache_length: Tensor,
        tree_mask: Tensor,
        first_visible: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = _LayerRows(self._attention, key_cache, value_cache, cache_length, tree_mask, first_visible)
        after = self.layer(hidden, position_embeddings=(cosines, sines), attention_mask=rows)
        self._tell(rows.how)
        return after, rows.key, rows.value


class _LayerRows(AttentionRows):
    """Rows of one layer, whose masks are given; they keep what the layer makes of them."""

    key: Tensor
    value: Tensor
    how: LayerAttention

    def __init__(self, attention: TreeAttention, *given: Tensor) -> None:
        self._attention = attention
        self._given = given

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: LayerAttention) -> Tensor:
        """See `AttentionRows.attend`."""
        self.key, self.value, self.how = key, value, how
        key_cache, value_cache, cache_length, tree_mask, first_visible = self._given
        first = None if how.window is None else first_visible
        return self._attention(query, key, value, key_cache, value_cache, cache_length, tree_mask, first, how)


class _Opaque(nn.Module):
    """Stands for the run of layers from `index` on, which attend so: one node of the graph, without their caches."""

    def __init__(self, index: int, attention: LayerAttention) -> None:
        super().__init__()
        self._index = index
        self._attention = attention

    def forward(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: TreeRows) -> Tensor:
        mask, first_visible = attention_mask.visible(self._attention)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OPAQUE}",
            [hidden, *position_embeddings, attention_mask.cache_length, mask]
            + ([] if first_visible is None else [first_visible]),
            attrs={"layer": self._index},
            dtype=hidden.dtype,
            shape=hidden.shape,
            version=DOMAIN_VERSION,
        )


class _Covered(nn.Module):
    """Stands for a layer that the node of an earlier one covers."""

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


class TracedLayers:
    """The layers of `model`, each kind of them traced by `trace`."""

    def __init__(self, model: HiddenTransferModel, trace: Trace) -> None:
        self._layers = decoder_parts(model.base).layers
        prefixes = {module: name for name, module in model.named_modules()}
        self._prefixes = [prefixes[layer] for layer in self._layers]
        embeddings = _position_embeddings(model)
        kinds: dict[Hashable, Kind] = {}
        self._kinds: list[Kind] = []
        for layer, embedding in zip(self._layers, embeddings, strict=True):
            what = (described(layer), embedding[0].shape[-1])
            if what not in kinds:
                kinds[what] = _traced(model, layer, embedding, trace)
            self._kinds.append(kinds[what])
        # Layers of one kind that no rows join between have one node: the number of them by the first of them.
        self._runs: dict[int, int] = {}
        for index, kind in enumerate(self._kinds):
            if index == 0 or kind is not self._kinds[index - 1] or model.transfer.joining(index):
                first = index
                self._runs[first] = 0
            self._runs[first] += 1

    @contextlib.contextmanager
    def opaque(self) -> Iterator[None]:
        """Have a node in the place of each run of layers while the model is traced in this block."""
        layers = list(self._layers)
        for index, kind in enumerate(self._kinds):
            self._layers[index] = _Opaque(index, kind.attention) if index in self._runs else _Covered()
        try:
            yield
        finally:
            for index, layer in enumerate(layers):
                self._layers[index] = layer

    def stamp(self, model: ir.Model) -> None:
        """Put the nodes of its layers in the place of each such node, and add the caches to the graph's inputs, and the
        new keys and values to its outputs.
        """
        keys, values = [], []
        for place in list(model.graph):
            if place.domain != DOMAIN or place.op_type != OPAQUE:
                continue
            hidden, cosines, sines, *seen = place.inputs
            first = place.attributes["layer"].as_int()
            for index in range(first, first + self._runs[first]):
                kind = self._kinds[index]
                key_cache, value_cache = kind.cache(index)
                given = [hidden, cosines, sines, key_cache, value_cache, *seen]
                hidden, key, value = _stamp(model, place, kind.model, given, self._prefixes[index])
                keys.append((key_cache, key))
                values.append((value_cache, value))
            assert hidden is not None
            ir.convenience.replace_all_uses_with(place.outputs[0], hidden)
            model.graph.remove(place, safe=True)
        for cache, new in keys + values:
            model.graph.inputs.append(cache)
            model.graph.outputs.append(new)


def described(module: nn.Module) -> Hashable:
    """Return what tells modules apart whose graphs may differ: all but the values of their parameters.

    What is not known to be plain data is the same only if it is the same object: that costs time at worst.
    """
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != PLACE}
    parameters = [(name, tuple(p.shape), p.dtype) for name, p in module.named_parameters(recurse=False)]
    buffers = [(name, str(b.dtype), str(b.tolist())) for name, b in module.named_buffers(recurse=False)]
    return (
        type(module),
        tuple((name, _comparable(own[name])) for name in sorted(own)),
        tuple(parameters),
        tuple(buffers),
        tuple((name, described(child)) for name, child in module.named_children()),
    )


def _comparable(value: Any) -> Hashable:
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_comparable, value))
    if isinstance(value, functools.partial):
        return type(value), _comparable([value.func, *value.args]), _comparable(sorted(value.keywords.items()))
    if isinstance(value, MethodType):
        # Of a module that is described itself.
        return type(value), value.__func__
    return type(value), id(value)


def _position_embeddings(model: HiddenTransferModel) -> list[tuple[Tensor, Tensor]]:
    hidden = torch.zeros(BATCH, ROWS, model.base.config.hidden_size, dtype=model.base.dtype)
    return decoder_parts(model.base).rotary(hidden, torch.zeros(BATCH, ROWS, dtype=torch.int64))


def _traced(model: HiddenTransferModel, layer: nn.Module, embedding: tuple[Tensor, Tensor], trace: Trace) -> Kind:
    # Cosines and sines may have another type than what they rotate.
    config, dtype = model.base.config, model.base.dtype
    cache = torch.zeros(BATCH, config.num_key_value_heads, CAPACITY, head_dim(config), dtype=dtype)
    inputs = (
        torch.zeros(BATCH, ROWS, config.hidden_size, dtype=dtype),
        *(part.clone() for part in embedding),
        cache,
        cache.clone(),
        torch.full((BATCH,), CAPACITY, dtype=torch.int64),
        torch.ones(BATCH, ROWS, ROWS, dtype=torch.bool),
        torch.zeros(BATCH, ROWS, dtype=torch.int64),
    )
    batch, rows, capacity = (torch.export.Dim(name) for name in ("B", "N", "S"))
    shapes: tuple[dict[int, Any], ...] = (
        {0: batch, 1: rows},
        {0: batch, 1: rows},
        {0: batch, 1: rows},
        {0: batch, 2: capacity},
        {0: batch, 2: capacity},
        {0: batch},
        {0: batch, 1: rows, 2: rows},
        {0: batch, 1: rows},
    )
    told: list[LayerAttention] = []
    traced = trace(_OneLayer(layer, model.attention, told.append), inputs, shapes)
    return Kind(traced, told[0])


def _stamp(
    model: ir.Model, place: ir.Node, kind: ir.Model, given: Sequence[ir.Value | None], prefix: str
) -> list[ir.Value]:
    """Insert a copy of the nodes of `kind` before `place`, with these inputs and the weights of the layer named
    `prefix`; return its outputs.
    """
    graph = model.graph
    given = [*given, *[None] * (len(kind.graph.inputs) - len(given))]
    values: dict[ir.Value | None, ir.Value | None] = {None: None, **dict(zip(kind.graph.inputs, given, strict=True))}
    sizes = _sizes(kind.graph.inputs, given)
    for name, value in kind.graph.initializers.items():
        own = f"model.{prefix}.{name.removeprefix('layer.')}"
        copied = ir.Value(name=own, shape=value.shape, type=value.type, const_value=value.const_value)
        graph.register_initializer(copied)
        values[value] = copied
    nodes = []
    for node in kind.graph:
        for value in node.outputs:
            values[value] = ir.Value(name=f"{prefix}.{value.name}", shape=_resized(value.shape, sizes), type=value.type)
        copy = ir.Node(
            node.domain,
            node.op_type,
            [values[value] for value in node.inputs],
            node.attributes.values(),
            overload=node.overload,
            outputs=[output for value in node.outputs if (output := values[value]) is not None],
            version=node.version,
        )
        nodes.append(copy)
    graph.insert_before(place, nodes)
    for identifier, function in kind.functions.items():
        model.functions.setdefault(identifier, function)
    for domain, version in kind.opset_imports.items():
        model.opset_imports.setdefault(domain, version)
    return [output for value in kind.graph.outputs if (output := values[value]) is not None]


def _sizes(inputs: Sequence[ir.Value], given: Sequence[ir.Value | None]) -> dict[str | None, Any]:
    """Return what the named sizes of a kind are where it is stamped."""
    sizes: dict[str | None, Any] = {}
    for value, real in zip(inputs, given, strict=True):
        if value.shape is None or real is None or real.shape is None:
            continue
        for name, size in zip(value.shape, real.shape, strict=True):
            if isinstance(name, ir.SymbolicDim):
                sizes.setdefault(name.value, size)
    return sizes


def _resized(shape: ir.Shape | None, sizes: dict[str | None, Any]) -> ir.Shape | None:
    if shape is None:
        return None
    return ir.Shape([sizes.get(size.value) if isinstance(size, ir.SymbolicDim) else size for size in shape])
