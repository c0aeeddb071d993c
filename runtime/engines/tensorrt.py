"""A TensorRT plan on an NVIDIA GPU, of TensorRT or of TensorRT for RTX.

Everything that a pass touches stays on the GPU: weights, the cache, new keys and values, logits. The host sends one
small block of inputs, and reads the logits of the tree and the draft logits of the accepted node. Passes that decode
are brought to few shapes, each of which is captured as a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plugins.binaries import KernelBinaries
from plugins.launch import CommitLauncher
from plugins.tensorrt_plugin import VERSION, failures, register
from runtime import bindings
from runtime.bindings import GraphDims
from runtime.engine_file import PlanFile
from runtime.engines import Outputs
from runtime.engines.buffers import DraftRows, PassBuffers
from runtime.engines.cuda import Cuda
from runtime.engines.device_cache import CacheMemory, DeviceCache
from runtime.engines.padding import bucket, pad
from runtime.engines.plans import RuntimeCache, check_device, deserialise, import_product, make_logger
from runtime.errors import EngineFileError, InputError
from runtime.tree import Rows, TreeSizes

VERIFICATION, PROMPT = 0, 1


class TensorRTEngine:
    """The plan at `path`; `about` is what `engine.json` says of it, `plan_hash` its SHA-256, `usual` the sizes of most
    passes. `use_graphs=False` launches every kernel of every pass, for comparison.

    Raises `EngineFileError` when the plan is not of this TensorRT version or GPU, and `InputError` when there is no GPU
    or library to run it.
    """

    def __init__(
        self,
        path: Path,
        dims: GraphDims,
        about: PlanFile,
        plan_hash: str,
        usual: TreeSizes,
        commit_kernels: KernelBinaries,
        *,
        use_graphs: bool = True,
    ) -> None:
        self.dims = dims
        self._limits = about.limits
        self._usual = usual
        self._trt = import_product(about)
        self._cuda = Cuda()
        check_device(path, about, self._cuda)
        self._log = make_logger(self._trt)
        if about.attention == "plugin":
            _register_plugin(self._trt, path, about)
        self._runtime, self._engine = deserialise(self._trt, self._log, path, about)
        try:
            self._commit = CommitLauncher(commit_kernels)
        except ValueError as error:
            raise EngineFileError(f"{path}: {error}") from error
        self._runtime_cache = RuntimeCache(self._engine, plan_hash)
        self._use_graphs = use_graphs
        # Contexts run one after the other, and so can share it.
        self._scratch = self._cuda.allocate(int(self._engine.device_memory_size_v2))
        self._buffers = PassBuffers(self._cuda, dims, about.limits)
        self._cache_memory = CacheMemory(self._cuda, dims, about.limits.capacity)
        self._prompt: _Context | None = None
        self._passes: dict[tuple[int, ...], _CapturedPass] = {}
        self._last: Rows | None = None

    @property
    def captured(self) -> tuple[int, int]:
        """How many of the shapes that decoding has had are captured as a CUDA graph, and how many there are."""
        return sum(one.graph is not None for one in self._passes.values()), len(self._passes)

    @property
    def gpu_name(self) -> str:
        """The GPU that passes run on."""
        return self._cuda.name

    def new_cache(self) -> DeviceCache:
        """Return an empty cache. Only the newest one may be used: all share one memory."""
        self._cuda.use()
        return DeviceCache(self._cache_memory, self._commit_rows)

    def run(self, rows: Rows, cache: DeviceCache) -> Outputs:
        """See `Engine.run`. Raises `InputError` for more rows than the plan was built for."""
        self._cuda.use()
        cache.check_newest()
        is_prompt = _is_prompt(rows)
        self._check_limits(rows, cache, is_prompt)
        if is_prompt:
            pseudo = np.arange(sum(map(len, rows.pseudo_parents)), dtype=np.int64)
            self._run_prompt(rows, cache)
            self._last = rows
        else:
            sizes = bucket(rows, self._usual, self._limits.max_rows)
            padded = pad(rows, sizes, self.dims.join_order)
            pseudo = padded.pseudo
            self._buffers.write(padded.rows, cache.length)
            found = self._pass(sizes, cache)
            found.run()
            self._last = padded.rows
            if found.runs == 2:
                # Rare, and by then whatever this shape needs has been compiled.
                self._runtime_cache.save()
        self._cuda.synchronise()
        return Outputs(self._buffers.logits(len(rows.logit_rows)), DraftRows(self._buffers, pseudo), (), ())

    def _run_prompt(self, rows: Rows, cache: DeviceCache) -> None:
        """Run a prompt chunk, of whatever length: too many shapes for a graph of each."""
        if self._prompt is None:
            self._prompt = _Context(self, PROMPT)
        sizes = TreeSizes(len(rows.input_ids), tuple(map(len, rows.pseudo_parents)))
        self._prompt.set_shapes(sizes, len(rows.logit_rows), cache)
        self._buffers.write(rows, cache.length)
        self._prompt.enqueue()

    def _pass(self, sizes: TreeSizes, cache: DeviceCache) -> _CapturedPass:
        key = (sizes.tree_rows, *sizes.pseudo_rows, cache.capacity)
        if key not in self._passes:
            context = _Context(self, VERIFICATION)
            context.set_shapes(sizes, sizes.tree_rows, cache)
            self._passes[key] = _CapturedPass(self._cuda, context, self._use_graphs)
        return self._passes[key]

    def _commit_rows(self, cache: DeviceCache, accepted: Sequence[int]) -> None:
        """Copy the keys and values of `accepted` tree rows of the last pass behind those of `cache`."""
        assert self._last is not None, "no pass has run"
        self._cuda.use()
        table = self._buffers.commit_table(cache, accepted, self._last)
        heads = self.dims.key_value_heads
        self._commit(table, len(accepted), heads, cache.length, cache.capacity, self._cuda.stream)

    def _check_limits(self, rows: Rows, cache: DeviceCache, is_prompt: bool) -> None:
        limits = self._limits
        flag = "--chunk" if is_prompt else "--max-rows"
        most = limits.chunk if is_prompt else limits.max_rows
        counts = {bindings.INPUT_IDS: len(rows.input_ids)}
        counts |= {bindings.pseudo_parent(k): len(parents) for k, parents in enumerate(rows.pseudo_parents, start=1)}
        for name, count in counts.items():
            if count > most:
                raise InputError(
                    f"{name} has {count} rows, and this plan was built for 1 to {most}; use fewer, or export it again "
                    f"with {flag} {count}"
                )
        if cache.length >= limits.max_context:
            raise InputError(
                f"{cache.length + 1} tokens of context are more than the {limits.max_context} that this plan was "
                "built for; export it again with a larger --max-context"
            )


def _register_plugin(trt: Any, path: Path, about: PlanFile) -> None:
    """Let the library know the plugin that the plan has. Raises `EngineFileError` when it has another version of it."""
    if about.plugin_version != VERSION:
        raise EngineFileError(
            f"{path} has tree attention of version {about.plugin_version}, and this release runs version {VERSION}; "
            "export it again"
        )
    try:
        register(trt)
    except RuntimeError as error:
        raise InputError(f"the plugin of {path} cannot be registered: {error}") from error


def _is_prompt(rows: Rows) -> bool:
    """Whether the rows are a chunk of a prompt, as the profile for them expects: one row of logits, and drafts of that
    row only. A single row is not worth the distinction.
    """
    one_each = all(len(parents) <= 1 for parents in rows.pseudo_parents)
    return len(rows.logit_rows) == 1 and len(rows.input_ids) > 1 and one_each


class _Context:
    """An execution context in one optimisation profile, with the addresses of everything that a pass reads and writes.

    It belongs to `engine`, which it must not keep alive.
    """

    def __init__(self, engine: TensorRTEngine, profile: int) -> None:
        self._trt = engine._trt
        self._cuda = engine._cuda
        self._log = engine._log
        self._dims = engine.dims
        self._buffers = engine._buffers
        self._plan = engine._engine
        self._profile = profile
        self._scratch = engine._scratch
        self._set: tuple[int, ...] = ()
        self._logit_rows = 0
        self._context = self._create(engine._runtime_cache)
        if self._context is None:
            raise InputError(
                f"the plan cannot be run ({self._log.last_errors()}); the GPU has {self._cuda.free_memory() >> 20} MiB "
                "of memory free"
            )
        self._context.set_device_memory(self._scratch.address, self._scratch.size)
        if not self._context.set_optimization_profile_async(profile, self._cuda.stream):
            raise RuntimeError(f"profile {profile} cannot be used ({self._log.last_errors()})")

    def _create(self, cache: RuntimeCache) -> Any:
        trt, plan = self._trt, self._plan
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            return plan.create_execution_context(strategy)
        config = plan.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # TensorRT for RTX compiles for the shapes that it sees. A graph would keep the slower kernels that it runs
        # until it has; prompts have too many shapes to wait for each.
        kinds = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = (
            kinds.EAGER if self._profile == VERIFICATION else kinds.LAZY
        )
        cache.configure(config)
        return plan.create_execution_context(config)

    def set_shapes(self, sizes: TreeSizes, logit_rows: int, cache: DeviceCache) -> None:
        """Set the shapes of the next passes, which read `cache`. Raises `InputError` for one outside the profile."""
        wanted = (sizes.tree_rows, *sizes.pseudo_rows, logit_rows, cache.capacity)
        if wanted == self._set:
            return
        values = bindings.dynamic_dims(sizes.tree_rows, sizes.pseudo_rows, logit_rows, cache.capacity)
        for binding in self._dims.inputs():
            shape = binding.sizes(values)
            if not self._context.set_input_shape(binding.name, shape):
                least, _, most = self._plan.get_tensor_profile_shape(binding.name, self._profile)
                raise InputError(
                    f"{binding.name} of shape {shape} is outside what this plan was built for, {tuple(least)} to "
                    f"{tuple(most)}; export it again with a larger {_flag(binding.name, self._profile)}"
                )
        for name, address in self._buffers.addresses(cache).items():
            if not self._context.set_tensor_address(name, address):
                raise RuntimeError(f"{name} cannot be at {address:#x} ({self._log.last_errors()})")
        self._set = wanted
        self._logit_rows = logit_rows

    def may_be_captured(self) -> bool:
        """Whether the library can run with these shapes while a graph is captured."""
        check = getattr(self._context, "is_stream_capturable", None)
        return check is None or check(self._cuda.stream)

    def enqueue(self) -> None:
        """Enqueue a pass: send its inputs, run, fetch the logits."""
        self._buffers.upload()
        if not self._context.execute_async_v3(self._cuda.stream):
            reason = failures.pop() if failures else self._log.last_errors()
            raise RuntimeError(f"the pass failed ({reason})")
        self._buffers.download_logits(self._logit_rows)


@dataclass
class _CapturedPass:
    """A pass of one shape: a context of its own, and after its first run a CUDA graph."""

    cuda: Cuda
    context: _Context
    use_graphs: bool
    graph: Any = None
    runs: int = 0

    def run(self) -> None:
        """Enqueue the pass."""
        # The first run after shapes are set may prepare what cannot be captured.
        if self.graph is None and self.use_graphs and self.runs and self.context.may_be_captured():
            try:
                self.graph = self.cuda.capture(self.context.enqueue)
            except RuntimeError:
                # Slower without, and as right.
                self.use_graphs = False
        if self.graph is None:
            self.context.enqueue()
        else:
            self.cuda.replay(self.graph)
        self.runs += 1

    def __del__(self) -> None:
        if self.graph is not None:
            self.cuda.forget(self.graph)


def _flag(name: str, profile: int) -> str:
    if name.startswith(bindings.CACHE_PREFIXES):
        return "--max-context"
    return "--chunk" if profile == PROMPT else "--max-rows"
