"""The exported ONNX graph in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runtime import bindings
from runtime.bindings import GraphDims
from runtime.cache import KeyValueCache
from runtime.engines import Outputs
from runtime.errors import EngineFileError, InputError
from runtime.tree import Rows


class OnnxRuntimeEngine:
    """An ONNX Runtime session on the CPU. `threads` None lets ONNX Runtime use all physical cores."""

    def __init__(self, path: Path, dims: GraphDims, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(
                "ONNX Runtime is not installed; install it with: pip install 'hidden-transfer[cpu]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            if threads < 1:
                raise InputError(f"threads must be at least 1, not {threads}")
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineFileError(f"ONNX Runtime cannot load {path}: {error}; export it again") from error
        self.dims = dims
        self._check_bindings(path)
        self._outputs = [binding.name for binding in dims.outputs()]

    def run(self, rows: Rows, cache: KeyValueCache) -> Outputs:
        """See `Engine.run`."""
        feed = {
            bindings.INPUT_IDS: rows.input_ids[None],
            bindings.POSITION_IDS: rows.position_ids[None],
            bindings.TREE_MASK: rows.tree_mask[None],
            bindings.LOGIT_ROWS: rows.logit_rows[None],
            bindings.CACHE_LENGTH: np.array([cache.length], dtype=np.int64),
        }
        for step, parents in enumerate(rows.pseudo_parents, start=1):
            feed[bindings.pseudo_parent(step)] = parents[None]
        for layer in range(self.dims.num_layers):
            feed[bindings.key_cache(layer)] = cache.keys[layer]
            feed[bindings.value_cache(layer)] = cache.values[layer]
        logits, draft_logits, *new = self._session.run(self._outputs, feed)
        layers = self.dims.num_layers
        return Outputs(logits[0], draft_logits[0], new[:layers], new[layers:])

    def _check_bindings(self, path: Path) -> None:
        for found, expected in (
            (self._session.get_inputs(), self.dims.inputs()),
            (self._session.get_outputs(), self.dims.outputs()),
        ):
            names = [value.name for value in found]
            wanted = [binding.name for binding in expected]
            if names != wanted:
                odd = sorted(set(names) ^ set(wanted)) or names
                raise EngineFileError(
                    f"{path} does not have the graph its engine.json describes ({odd[0]}); export it again"
                )
