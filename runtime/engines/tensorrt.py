"""A TensorRT plan on an NVIDIA GPU, of TensorRT or of TensorRT for RTX.

Everything that a pass touches stays on the GPU: weights, the cache, new keys and values, logits. The host sends one
small block of inputs, and reads what was chosen of the logits (`choosing.py`); or, where the plan is of a release
without the kernels for that, the logits of the tree and the draft logits of the accepted node. Passes that decode are
brought to few shapes, each of which is captured as a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from plugins.binaries import KernelBinaries
from plugins.choose_launch import ChooseLauncher
from plugins.launch import CommitLauncher
from plugins.tensorrt_plugin import VERSION, failures, register
from runtime import bindings
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import PlanFile
from runtime.engines.buffers import DeviceResult, PassBuffers
from runtime.engines.choosing import DeviceChoices
from runtime.engines.cuda import Cuda
from runtime.engines.device_cache import CacheMemory, DeviceCache, DeviceCacheEngine, cache_of
from runtime.engines.layout import BatchInputs, bucket, shared_sizes, stack
from runtime.engines.plans import RuntimeCache, check_device, deserialise, import_product, make_logger
from runtime.engines.protocol import Batch, Freshness, Result
from runtime.errors import EngineFileError, InputError
from runtime.rows import Phase
from runtime.tree import TreeSizes

VERIFICATION, PROMPT = 0, 1


class TensorRTEngine(DeviceCacheEngine):
    """The plan at `path`; `about` is what `engine.json` says of it, `plan_hash` its SHA-256, `usual` the sizes of most
    passes. `use_graphs=False` launches every kernel of every pass, for comparison.

    Raises `EngineFileError` when the plan is not of this TensorRT version or GPU, and `InputError` when there is no GPU
    or library to run it.
    """

    # Plans take more; the commit kernel, and the memory of caches, take one.
    max_batch = 1
    max_slots = 1

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
        opened: BufferedReader | None = None,
        gpu: int = 0,
    ) -> None:
        self.dims = dims
        self._limits = about.limits
        self._usual = usual
        self._trt = import_product(about)
        self._cuda = Cuda(gpu)
        check_device(path, about, self._cuda)
        self._log = make_logger(self._trt)
        if about.attention == "plugin":
            _register_plugin(self._trt, path, about)
        self._runtime, self._engine = deserialise(self._trt, self._log, path, about, opened)
        try:
            self._commit = CommitLauncher(commit_kernels)
            choose = ChooseLauncher.of(commit_kernels)
        except ValueError as error:
            raise EngineFileError(f"{path}: {error}") from error
        self._runtime_cache = RuntimeCache(self._engine, plan_hash)
        self._use_graphs = use_graphs
        # Contexts run one after the other, and so can share it.
        self._scratch = self._cuda.allocate(int(self._engine.device_memory_size_v2))
        self._buffers = PassBuffers(self._cuda, dims, about.limits)
        self._choices = DeviceChoices(self._cuda, choose, dims.vocab_size) if choose else None
        self._freshness = Freshness()
        self._cache_memory = CacheMemory(self._cuda, dims, about.limits.capacity)
        self._prompt: _Context | None = None
        self._passes: dict[tuple[int, ...], _CapturedPass] = {}

    @property
    def captured(self) -> tuple[int, int]:
        """The number of shapes that are captured as a CUDA graph, and of all shapes that decoding has had."""
        return sum(one.graph is not None for one in self._passes.values()), len(self._passes)

    def run(self, batch: Batch) -> DeviceResult:
        """See `Engine.run`. Raises `InputError` for more rows than the plan was built for."""
        self._cuda.use()
        (slot,) = batch.slots
        cache = cache_of(slot)
        self._check_limits(batch, cache)
        number = self._freshness.next_pass()
        if batch.phase is Phase.PROMPT:
            laid_out = stack(batch.rows, batch.lengths, self.dims.join_order)
            self._run_prompt(laid_out, cache)
        else:
            laid_out = stack(
                batch.rows, batch.lengths, self.dims.join_order, bucket(batch.rows, self._usual, self._limits.max_rows)
            )
            self._buffers.write(laid_out)
            found = self._pass(laid_out.sizes, cache)
            found.run()
            if found.runs == 2:
                # Rare, and by then whatever this shape needs has been compiled.
                self._runtime_cache.save()
        chosen = None
        if self._choices is None:
            self._buffers.download_logits(laid_out.logit_count)
        else:
            chosen = self._choices.enqueue(batch.rows, laid_out, *self._buffers.logit_addresses)
        self._cuda.synchronise()
        logits = self._buffers.logits(laid_out.logit_count if chosen is None else 0)
        return DeviceResult(
            batch, self._buffers, laid_out.sizes, logits, laid_out.pseudo[0], number, self._freshness, chosen
        )

    def commit(self, result: Result, accepted: Sequence[Sequence[int]]) -> None:
        """See `Engine.commit`: copies the accepted rows behind those of the cache."""
        assert isinstance(result, DeviceResult), "a result of another engine"
        self._freshness.commit(result.number)
        self._cuda.use()
        for slot, rows in zip(result.batch.slots, accepted, strict=True):
            cache = cache_of(slot)
            if not rows:
                continue
            cache.reserve(len(rows))
            table = self._buffers.commit_table(cache, rows, result.sizes)
            heads = self.dims.key_value_heads
            self._commit(table, len(rows), heads, cache.length, cache.capacity, self._cuda.stream)
            cache.length += len(rows)

    def _run_prompt(self, laid_out: BatchInputs, cache: DeviceCache) -> None:
        """Run a prompt chunk, of whatever length: too many shapes for a graph of each."""
        if self._prompt is None:
            self._prompt = _Context(self, PROMPT)
        self._prompt.set_shapes(laid_out.sizes, laid_out.logit_count, cache)
        self._buffers.write(laid_out)
        self._prompt.enqueue()

    def _pass(self, sizes: TreeSizes, cache: DeviceCache) -> _CapturedPass:
        key = (sizes.tree_rows, *sizes.pseudo_rows, cache.capacity)
        if key not in self._passes:
            context = _Context(self, VERIFICATION)
            context.set_shapes(sizes, sizes.tree_rows, cache)
            self._passes[key] = _CapturedPass(self._cuda, context, self._use_graphs)
        return self._passes[key]

    def _check_limits(self, batch: Batch, cache: DeviceCache) -> None:
        limits = self._limits
        is_prompt = batch.phase is Phase.PROMPT
        flag = "--chunk" if is_prompt else "--max-rows"
        most = limits.chunk if is_prompt else limits.max_rows
        sizes = shared_sizes(batch.rows)
        counts = {bindings.INPUT_IDS: sizes.tree_rows}
        counts |= {bindings.pseudo_parent(step): rows for step, rows in enumerate(sizes.pseudo_rows, start=1)}
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

    def may_be_captured(self) -> bool:
        """Return whether the library can run with these shapes while a graph is captured."""
        check = getattr(self._context, "is_stream_capturable", None)
        return check is None or check(self._cuda.stream)

    def enqueue(self) -> None:
        """Enqueue a pass: send its inputs, run."""
        self._buffers.upload()
        if not self._context.execute_async_v3(self._cuda.stream):
            reason = failures.pop() if failures else self._log.last_errors()
            raise RuntimeError(f"the pass failed ({reason})")


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
