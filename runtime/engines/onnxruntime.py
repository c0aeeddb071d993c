"""The portable graph in ONNX Runtime, on the CPU: what the graph lowered for it is compared with, and what runs where
there is none, as in half precision.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from runtime import bindings
from runtime.bindings import Binding, GraphDims
from runtime.checks import MOST_THREADS, whole
from runtime.engines.byte_sums import EXACT_SUMS, PRODUCT, byte_sums_are_exact
from runtime.engines.external_weights import GraphFiles, hand_over
from runtime.engines.host_cache import HostCacheEngine, HostResult, caches_of
from runtime.engines.layout import BatchInputs, stack
from runtime.engines.protocol import Batch
from runtime.errors import EngineError, EngineFileError, InputError, one_line
from runtime.foreign import failures

# Characters of what ONNX Runtime says: it begins with where in its code that is.
LONGEST = 1000
# Names of types in ONNX Runtime, where they are others than NumPy's.
ORT_TYPES = {"float32": "float"}
# A provider's name, alone or with its options.
Provider = str | tuple[str, dict[str, str]]
LOG = logging.getLogger(__name__)


class OnnxRuntimeEngine(HostCacheEngine):
    """An ONNX Runtime session on the CPU. `threads` None lets ONNX Runtime use all physical cores; a `small` one takes
    as little memory as it can, and more time.
    """

    # Caches of several requests are copied together for each pass.
    max_batch = 8

    def __init__(
        self, graph: Path | GraphFiles, dims: GraphDims, threads: int | None = None, *, small: bool = False
    ) -> None:
        self._session = open_session(graph, ["CPUExecutionProvider"], threads, small=small)
        self.dims = dims
        self._path = path_of(graph)
        check_bindings(self._session, self._path, dims.inputs(), dims.outputs())
        self._outputs = [binding.name for binding in dims.outputs()]

    def run(self, batch: Batch) -> HostResult:
        """See `Engine.run`."""
        laid_out = stack(batch.rows, batch.lengths, self.dims.join_order)
        with running(self._path):
            found = self._session.run(self._outputs, graph_inputs(laid_out, batch))
            self._check_shapes(found, laid_out)
        logits, draft_logits, *new = found
        layers = self.dims.num_layers
        return HostResult(batch, logits, draft_logits, new[:layers], new[layers:], laid_out.pseudo)

    def _check_shapes(self, found: Sequence[NDArray], laid_out: BatchInputs) -> None:
        # A graph may state sizes that its outputs do not have.
        sizes = laid_out.dims(0)
        for binding, array in zip(self.dims.outputs(), found, strict=True):
            if array.shape != (expected := binding.sizes(sizes)):
                raise ValueError(f"{binding.name} is of shape {list(array.shape)}, not {list(expected)}")


def graph_inputs(laid_out: BatchInputs, batch: Batch) -> dict[str, NDArray]:
    """Return the inputs of the graph for a pass of `batch`, `laid_out`, by name."""
    feed = dict(laid_out.values)
    for layer, (keys, values) in enumerate(zip(*caches_of(batch), strict=True)):
        feed[bindings.key_cache(layer)] = keys
        feed[bindings.value_cache(layer)] = values
    return feed


def path_of(graph: Path | GraphFiles) -> Path:
    """Return the path of a graph, for messages."""
    return graph.path if isinstance(graph, GraphFiles) else graph


def running(path: Path) -> AbstractContextManager[None]:
    """Raise `EngineError` for whatever ONNX Runtime raises in the block, where it runs the graph at `path`: one that
    can be loaded may still not fit its inputs, or those of some texts.
    """
    return failures(
        lambda cause: EngineError(
            f"ONNX Runtime cannot run {path}: {cause}; free memory if that is what it lacks, or export the engine again"
        )
    )


def use_little_memory(options: Any) -> list[str]:
    """Let a session with these options leave weights where their file is mapped, neither cast nor arranged beforehand;
    return the optimizers to disable for it.
    """
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    # The second casts weights in float16 when they are loaded.
    return ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]


def open_session(
    graph: Path | GraphFiles,
    providers: Sequence[Provider],
    threads: int | None = None,
    *,
    small: bool = False,
    exact_sums: bool = False,
) -> Any:
    """Return a session of `graph`; see `OnnxRuntimeEngine`. A graph given by path keeps the file of its weights mapped:
    that is for files which nobody else changes. With `exact_sums` sums of products of bytes do not saturate, on any
    processor; graphs whose weights are whole numbers that are scaled before a product cannot have that.

    Raises `InputError` without ONNX Runtime, `EngineFileError` when it cannot load the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            "ONNX Runtime is not installed; install it with: pip install 'hidden-transfer[cpu]'"
        ) from error
    options = onnxruntime.SessionOptions()
    # Fatal errors alone: all others are raised.
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = whole("threads", threads, 1, MOST_THREADS)
    disabled = use_little_memory(options) if small else None
    path = path_of(graph)
    if exact_sums and _has_products_of_bytes(graph) and not byte_sums_are_exact():
        LOG.warning("%s takes slower products: sums of bytes saturate on this processor, which has no VNNI", path)
        options.add_session_config_entry(EXACT_SUMS, "1")
    held = hand_over(graph, options, onnxruntime) if isinstance(graph, GraphFiles) else []
    try:
        session = onnxruntime.InferenceSession(
            graph.graph if isinstance(graph, GraphFiles) else graph,
            options,
            providers=list(providers),
            disabled_optimizers=disabled,
            # It would try again on the CPU, and print that.
            enable_fallback=0,
        )
    except Exception as error:
        raise EngineFileError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {one_line(error, LONGEST)}; update "
            "onnxruntime, or export the engine again"
        ) from error
    finally:
        # The session has copied what it keeps.
        held.clear()
    return session


def _has_products_of_bytes(graph: Path | GraphFiles) -> bool:
    return PRODUCT in (graph.graph if isinstance(graph, GraphFiles) else graph.read_bytes())


def check_bindings(session: Any, path: Path, inputs: Sequence[Binding], outputs: Sequence[Binding]) -> None:
    """Raise `EngineFileError` unless the graph at `path`, opened as `session`, has these inputs and outputs."""
    for found, expected in ((session.get_inputs(), inputs), (session.get_outputs(), outputs)):
        names = [value.name for value in found]
        wanted = [binding.name for binding in expected]
        odd = [] if names == wanted else sorted(set(names) ^ set(wanted)) or names
        odd += [value.name for value, binding in zip(found, expected, strict=False) if _differs(value, binding)]
        if odd:
            raise EngineFileError(
                f"{path} does not have the graph its engine.json describes ({one_line(odd[0])}); export it again"
            )


def _differs(value: Any, binding: Binding) -> bool:
    """Return whether the graph's `value` is of another type than `binding`, of another rank, or of another size where
    that is fixed.
    """
    if value.type != f"tensor({ORT_TYPES.get(binding.dtype, binding.dtype)})":
        return True
    # A shape that the graph does not state is empty. Dynamic dimensions have names, or none.
    return bool(value.shape) and (
        len(value.shape) != len(binding.shape)
        or any(
            isinstance(size, int) and isinstance(fixed, int) and size != fixed
            for size, fixed in zip(value.shape, binding.shape, strict=True)
        )
    )
