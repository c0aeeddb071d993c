"""Weight-only quantisation of a graph: weights rounded to the nearest, or as `ht_export.quantize.gptq` rounds them.

How they are stored, and what multiplies with them, depends on the engine: `ht_export.quantize.formats`. The embedding
stays as it is: a pass reads a few rows of it only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ht_export.graph.lazy_weights import widen_weights
from ht_export.quantize.formats import Storage
from ht_export.quantize.gptq import round_calibrated
from ht_export.quantize.products import Weights, products
from ht_export.scopes import collected

# Second moments of rows [K, K], by the name of the value that has them.
Moments = dict[str, NDArray[np.float64]]
# Bytes of an initializer that need no place in a file of weights.
SMALL = 256


def quantise(graph: Path, out: Path, storage: Storage, moments: Iterable[Moments] = ({},)) -> None:
    """Write the graph at `graph` to `out`, weights quantised as `storage` has them; those for which there are second
    `moments` of the rows that they meet calibrated, all others rounded to the nearest.

    Its own weights may be at the place where those of `out` will be.
    """
    weights = out.with_name(f"{out.name}.data")
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
        in_parts = collected(_write_in_parts(graph, Path(folder), storage, moments))
        # Nothing maps it any more, so that its room on the disk is free before as much again is written.
        weights.unlink(missing_ok=True)
        ir.save(ir.load(in_parts), out, external_data=weights.name)


def _write_in_parts(graph: Path, folder: Path, storage: Storage, moments: Iterable[Moments]) -> Path:
    """Write the quantised graph to `folder`, its weights in many files there; return its path.

    Quantised weights go to the disk one by one: those of a large model would fill the memory.
    """
    model = ir.load(graph)
    for number, (product, rows) in enumerate(_products(model.graph, moments)):
        before = set(model.graph.initializers)
        _replace(model.graph, product, storage, rows)
        added = [value for name, value in model.graph.initializers.items() if name not in before]
        _put_away(added, folder / f"{number}.data")
    model.opset_imports.update(storage.opsets)
    RemoveUnusedNodesPass()(model)
    widen_weights(model.graph)
    _put_away(_not_in(folder, model.graph), folder / "rest.data")
    path = folder / "graph.onnx"
    ir.save(model, path)
    return path


def _put_away(values: Sequence[ir.Value], path: Path) -> None:
    """Let initializers be mapped from a new file at `path`."""
    tensors = [value.const_value for value in values if value.const_value is not None]
    kept = ir.external_data.convert_tensors_to_external(tensors, path.parent, path.name) if tensors else []
    for value, tensor in zip(values, kept, strict=True):
        value.const_value = tensor


def _not_in(folder: Path, graph: ir.Graph) -> list[ir.Value]:
    """Return initializers that are neither in a file in `folder` nor so small that they can be in the graph's own."""
    return [
        value
        for value in graph.initializers.values()
        if (tensor := value.const_value) is not None
        and not (isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir) == folder)
        and tensor.nbytes > SMALL
    ]


def _products(graph: ir.Graph, moments: Iterable[Moments]) -> Iterator[tuple[ir.Node, NDArray[np.float64] | None]]:
    """Yield products with weights, and the second moments of their rows: those that have some as these come, and with
    the last ones all others.
    """
    for found, last in _with_last(moments):
        for node, _ in products(graph):
            rows = node.inputs[0]
            assert rows is not None
            if rows.name in found or last:
                yield node, found.get(rows.name or "")


def _with_last(found: Iterable[Moments]) -> Iterator[tuple[Moments, bool]]:
    """Yield each with whether it is the last one."""
    found = iter(found)
    held = next(found, {})
    for one in found:
        yield held, False
        held = one
    yield held, True


def _replace(graph: ir.Graph, product: ir.Node, storage: Storage, moments: NDArray[np.float64] | None) -> None:
    weights = Weights.of(product)
    assert weights is not None
    if not storage.takes(weights.shape[0]):
        return
    array, ends = weights.numbers().T, None
    if moments is not None and storage.grid is not None:
        array, ends = round_calibrated(array, moments, storage.grid)
    storage.replace(graph, product, weights.value.name or "", array, ends)
