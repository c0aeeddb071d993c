"""An engine's model without some of its blocks, which drafts over the same weights and in the same cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from ht_export.graph.lower_cpu import can_be_lowered, lower_for_cpu
from ht_export.graph.skip_blocks import skip_blocks
from ht_export.model.blocks import Blocks
from runtime import bindings
from runtime.bundle.reading import read_bundle
from runtime.engines.external_weights import GraphFiles
from runtime.engines.onnxruntime import open_session, running
from runtime.engines.onnxruntime_cpu import BoundPass, OnnxRuntimeCpuEngine
from runtime.engines.packing import pack
from runtime.engines.protocol import Engine
from runtime.errors import EngineFileError, InputError
from runtime.foreign import failures
from runtime.rows import lay_out
from runtime.tree import chain


class DraftModel:
    """The model of `engine`, opened from `path`, without `blocks`, for one text at a time.

    It reads the keys and values that the whole model has left of certain tokens, and writes its own of drafted ones
    behind them, where the next pass of the whole model writes what is right: no cache of its own has to be kept. So it
    is as the paper has it. Raises `InputError` for engines that it cannot be made of.
    """

    def __init__(self, path: Path, engine: Engine, blocks: Blocks, threads: int | None = None) -> None:
        if not isinstance(engine, OnnxRuntimeCpuEngine) or not can_be_lowered(engine.dims):
            raise InputError(
                f"--self-speculative: {path} does not run from a graph for the CPU, whose cache the draft could share; "
                "compare engines on the CPU, in fp32, int8 or int4, or leave it out"
            )
        self._engine = engine
        self._path = path
        with read_bundle(path).files as files:
            with failures(
                lambda cause: EngineFileError(f"blocks cannot be left out of {path} ({cause}); export it again")
            ):
                model = ir.serde.deserialize_model(onnx.ModelProto.FromString(files.graph))
                self.dims = skip_blocks(model, engine.dims, blocks)
                lower_for_cpu(model, self.dims)
                graph = ir.serde.serialize_model(model).SerializeToString()
            left = GraphFiles(path, graph, files.weights)
            self._session = open_session(left, ["CPUExecutionProvider"], threads, exact_sums=True)
        self._layers = blocks.kept_attention(engine.dims.num_layers)
        self._names = {binding.name for binding in self.dims.lowered_inputs()}
        self._logits = np.empty((1, self.dims.vocab_size), dtype=np.float32)
        self._no_drafts = np.empty((0, self.dims.draft_width), dtype=np.float32)
        self._bound: tuple[NDArray, int, BoundPass] | None = None

    def begin(self, length: int, rows: int) -> None:
        """Have room for `rows` drafted tokens behind the `length` certain ones, which are in the cache."""
        self._engine.cache.reserve(length, rows)

    def logits(self, token: int, length: int) -> NDArray[np.float32]:
        """Return the logits [V] of what follows `token`, the one at position `length`; they hold until the next call.

        The rows before it are in the cache: those of certain tokens, then those of tokens drafted by calls before.
        """
        steps = self.dims.num_steps
        nothing = (np.empty(0, dtype=np.int64),) * steps
        rows = lay_out(chain([token]), nothing, self.dims.join_order, length)
        bound = self._bound_pass()
        for name, value in pack([rows], [length], self.dims.join_order).values.items():
            if name in self._names:
                bound.give(name, value)
        for binding, buffer in zip(self.dims.outputs()[:2], (self._logits, self._no_drafts), strict=True):
            bound.take(binding.name, buffer, (1, *buffer.shape))
        with running(self._path):
            self._session.run_with_iobinding(bound.binding)
        return self._logits[0]

    def _bound_pass(self) -> BoundPass:
        """Return what has the cache of the one text under way bound, as far as this model has layers that attend."""
        arrays = self._engine.cache.arrays
        (index,) = self._engine.cache.used
        if self._bound is not None and self._bound[0] is arrays and self._bound[1] == index:
            return self._bound[2]
        binding = self._session.io_binding()
        for own, layer in enumerate(self._layers):
            names = (
                (bindings.key_cache(own), bindings.key_cache_out(own)),
                (bindings.value_cache(own), bindings.value_cache_out(own)),
            )
            for kind, (source, target) in enumerate(names):
                array = arrays[kind, layer, index : index + 1]
                where = ("cpu", 0, array.dtype, array.shape, array.ctypes.data)
                binding.bind_input(source, *where)
                binding.bind_output(target, *where)
        self._bound = arrays, index, BoundPass(binding)
        return self._bound[2]
