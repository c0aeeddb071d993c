"""Values that a pass computes on the way, from `transformers`, the PyTorch reference and ONNX graphs alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from ht_export.graph.domains import DOMAIN
from ht_export.model.reference import HiddenTransferModel
from ht_export.verify.passes import Computed, ReferenceEngine
from runtime import bindings
from runtime.bindings import GraphDims
from runtime.engines.host_cache import KeyValueCache
from runtime.engines.layout import stack
from runtime.engines.onnxruntime import graph_inputs, use_little_memory
from runtime.engines.packing import nobodys_rows
from runtime.engines.protocol import Batch
from runtime.rows import Rows

LOWERED_ATTENTION = "GroupQueryAttention"
# ONNX Runtime's option for the folder of the weights of a graph that is given as bytes.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Trace:
    """One pass: the outputs, and each layer's attention [R_l, Hq D] where it was asked for."""

    outputs: Computed
    attention: Sequence[NDArray] = ()


class Tracer(Protocol):
    """Something that runs passes and tells what it computed on the way."""

    def run(self, rows: Rows, cache: KeyValueCache) -> Trace:
        """Run `rows` once over the valid rows of `cache`, which stay as they are."""
        ...


class ReferenceTracer:
    """The PyTorch reference."""

    def __init__(self, model: HiddenTransferModel) -> None:
        self.engine = ReferenceEngine(model)

    def run(self, rows: Rows, cache: KeyValueCache) -> Trace:
        """See `Tracer.run`."""
        model, attention = self.engine.model, []
        compute = model.attention

        def tapped(*arguments: Any) -> Tensor:
            output = compute(*arguments)
            # [1, Hq, R, D] to [R, Hq D]
            attention.append(output[0].transpose(0, 1).flatten(1).numpy())
            return output

        model.attention = tapped
        try:
            return Trace(Computed.of(self.engine.run(Batch.of([rows], [cache]))), attention)
        finally:
            model.attention = compute


class GraphTracer:
    """An ONNX graph, portable or lowered, with the outputs of its attention nodes added to its own; in ONNX Runtime, or
    in ONNX's `reference` evaluator.
    """

    def __init__(self, path: Path, dims: GraphDims, *, reference: bool = False) -> None:
        self.dims = dims
        model = onnx.load(path, load_external_data=False)
        self._names = [output.name for output in model.graph.output]
        self._lowered = bindings.key_new(0) not in self._names
        self._packed = any(value.name == bindings.SLOT_ROWS for value in model.graph.input)
        taps = attention_outputs(model)
        self._names += taps
        self._compute = _evaluator(path, model, taps) if reference else tapped_session(path, taps, _element(dims))

    def run(self, rows: Rows, cache: KeyValueCache) -> Trace:
        """See `Tracer.run`."""
        layers = self.dims.num_layers
        batch = Batch.of([rows], [cache])
        feed = graph_inputs(stack(batch.rows, batch.lengths, self.dims.join_order), batch)
        for binding in self.dims.inputs():
            if binding.dtype == self.dims.dtype:
                feed[binding.name] = self._cache_input(feed[binding.name], len(rows.position_ids))
        if self._packed:
            feed |= nobodys_rows(1)
        found = self._compute(self._names, feed)
        logits, drafts, *new = found[: 2 + 2 * layers]
        outputs = Computed(logits[0], drafts[0], *self._new(new[:layers], new[layers:], rows, cache))
        return Trace(outputs, [_by_row(array) for array in found[2 + 2 * layers :]])

    def _cache_input(self, cached: NDArray, rows: int) -> NDArray:
        """Return a layer's keys or values in the graph's precision; a lowered graph writes its `rows` behind them."""
        room = ((0, 0), (0, 0), (0, rows if self._lowered else 0), (0, 0))
        return np.pad(cached.astype(self.dims.dtype), room)

    def _new(
        self, keys: list[NDArray], values: list[NDArray], rows: Rows, cache: KeyValueCache
    ) -> tuple[list[NDArray], list[NDArray]]:
        """Return new keys and values; a lowered graph's outputs are whole caches."""
        if not self._lowered:
            return keys, values
        sizes = bindings.dynamic_dims(len(rows.input_ids), rows.counts, 0, 0)
        return tuple(
            [
                array[:, :, cache.length : cache.length + binding.sizes(sizes)[2]]
                for array, binding in zip(arrays, self.dims.outputs()[2:], strict=False)
            ]
            for arrays in (keys, values)
        )  # type: ignore[return-value]


def transformers_trace(base: Any, ids: Sequence[int]) -> Trace:
    """Return what the base model's own forward computes for a whole text: logits [N, V], keys and values.

    `base` must not have become a `HiddenTransferModel` yet, so that nothing of ours takes part.
    """
    from transformers import DynamicCache

    # Without a configuration it keeps all of every layer, whatever its window.
    cache = DynamicCache()
    # Older releases of transformers know it by the latter name, and newer ones warn of that, to ignore it one day.
    name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
    with torch.inference_mode():
        logits = base(torch.tensor([ids]), use_cache=True, **{name: cache}).logits[0].float().numpy()
    keys, values = ([getattr(layer, kind).float().numpy() for layer in cache.layers] for kind in ("keys", "values"))
    return Trace(Computed(logits, logits[:0], keys, values))


def attention_outputs(model: onnx.ModelProto) -> list[str]:
    """Return the names of the outputs of the graph's attention nodes, layer by layer."""
    return [node.output[0] for node in model.graph.node if node.domain == DOMAIN or _is_lowered_attention(node)]


def _is_lowered_attention(node: onnx.NodeProto) -> bool:
    """Return whether `node` is attention of a lowered graph, or chooses between kinds of it."""
    branches = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    inside = [one.op_type for branch in branches for one in branch.node]
    return LOWERED_ATTENTION in (node.op_type, *inside)


Compute = Callable[[list[str], dict[str, NDArray]], list[Any]]


def tapped_session(
    path: Path, names: Sequence[str], element: int = onnx.TensorProto.FLOAT, *, small: bool = False
) -> Compute:
    """Return what runs the graph at `path` in ONNX Runtime, with the values of these `names` as outputs too; `small` as
    in `OnnxRuntimeEngine`.
    """
    import onnxruntime

    model = onnx.load(path, load_external_data=False)
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, element, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent))
    disabled = use_little_memory(options) if small else None
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    ).run


def _evaluator(path: Path, model: onnx.ModelProto, taps: Sequence[str]) -> Compute:
    from onnx.reference import ReferenceEvaluator

    for name in taps:
        # It asks for no type.
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.load_external_data_for_model(model, str(path.parent))
    return ReferenceEvaluator(model).run


def _by_row(attention: NDArray) -> NDArray:
    """Return [R, Hq D] of [1, Hq, R, D], or of [1, R, Hq D] as a lowered graph has it."""
    return attention[0] if attention.ndim == 3 else np.moveaxis(attention[0], 0, 1).reshape(attention.shape[2], -1)


def _element(dims: GraphDims) -> int:
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dims.dtype))
