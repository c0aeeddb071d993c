"""A TensorRT plan on an NVIDIA GPU, of TensorRT or of TensorRT for RTX.

Everything that a pass touches stays on the GPU: weights, the cache, new keys and values, logits. The host sends one
small block of inputs, and reads what was chosen of the logits (`choosing.py`); or, where the plan has no kernels for
that, logits of the tree and draft logits of the accepted node. Passes that decode are brought to few shapes, each of
which is captured as a CUDA graph and replayed; also in the number of requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from plugins.binaries import CHOOSE_DRAFTS, KernelBinaries
from plugins.choose_launch import ChooseLauncher
from plugins.launch import CommitLauncher
from plugins.tensorrt_plugin import VERSION, failures, register
from runtime import bindings
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import PlanFile
from runtime.engines.capturing_engine import CapturingEngine
from runtime.engines.choosing import DeviceChoices
from runtime.engines.cuda import Cuda
from runtime.engines.device_cache import DeviceCache
from runtime.engines.layout import BatchInputs, shared_sizes
from runtime.engines.plans import RuntimeCache, check_device, deserialise, import_product, make_logger
from runtime.engines.protocol import Batch
from runtime.errors import EngineError, EngineFileError, InputError
from runtime.rows import Phase
from runtime.tree import TreeSizes

VERIFICATION, PROMPT = 0, 1
# Of the memory that is free once weights, scratch memory and buffers are there, the share for keys and values: passes
# of many requests need some of the rest, and so do contexts and graphs.
SHARE = (3, 4)


class TensorRTEngine(CapturingEngine["_CapturedPass"]):
    """The plan at `path`; `about` is what `engine.json` says of it, `plan_hash` its SHA-256, `usual` the sizes of most
    passes. Keys and values take up to `memory_bytes` of the GPU's memory, None for `SHARE` of what is free.
    `use_graphs=False` launches every kernel of every pass, for comparison.

    Raises `EngineFileError` when the plan is not of this TensorRT version or GPU, and `InputError` when there is no GPU
    or library to run it, or too little memory.
    """

    def __init__(
        self,
        path: Path,
        dims: GraphDims,
        about: PlanFile,
        plan_hash: str,
        usual: TreeSizes,
        kernels: KernelBinaries,
        *,
        use_graphs: bool = True,
        opened: BufferedReader | None = None,
        gpu: int = 0,
        memory_bytes: int | None = None,
    ) -> None:
        self._trt = import_product(about)
        cuda = Cuda(gpu)
        check_device(path, about, cuda)
        self._log = make_logger(self._trt)
        if about.attention == "plugin":
            _register_plugin(self._trt, path, about)
        self._runtime, self._engine = deserialise(self._trt, self._log, path, about, opened)
        try:
            commit = CommitLauncher(kernels)
            choose = ChooseLauncher.of(kernels)
            choose_drafts = None if dims.draft_size is None else ChooseLauncher.of(kernels, CHOOSE_DRAFTS)
        except ValueError as error:
            raise EngineFileError(f"{path}: {error}") from error
        self._runtime_cache = RuntimeCache(self._engine, plan_hash)
        self._use_graphs = use_graphs
        # Contexts run one after the other, and so can share it.
        self._scratch = cuda.allocate(int(self._engine.device_memory_size_v2))
        super().__init__(cuda, dims, about.limits, memory_bytes, SHARE, usual, commit)
        if choose and dims.draft_size is None:
            self._choices = DeviceChoices(cuda, choose, dims.vocab_size)
        elif choose and choose_drafts:
            self._choices = DeviceChoices(cuda, choose, dims.vocab_size, (choose_drafts, dims.draft_width))
        self._prompt: _Context | None = None

    @property
    def captured(self) -> tuple[int, int]:
        """The number of shapes that are captured as a CUDA graph, and of all shapes of decoding that are held."""
        return sum(one.graph is not None for one in self._passes.values()), len(self._passes)

    def _run(self, batch: Batch, laid_out: BatchInputs, first: int) -> None:
        self._buffers.write(laid_out)
        if batch.phase is Phase.PROMPT:
            # Of whatever length: too many shapes for a graph of each.
            if self._prompt is None:
                self._prompt = _Context(self, PROMPT)
            self._prompt.set_shapes(laid_out, self.cache, first)
            self._prompt.enqueue()
            return
        found = self._pass(laid_out, lambda: self._captured(laid_out))
        found.run()
        if found.runs == 2:
            # Rare, and by then whatever this shape needs has been compiled.
            self._runtime_cache.save()
            self.refused += self._use_graphs and found.graph is None

    def _captured(self, laid_out: BatchInputs) -> _CapturedPass:
        context = _Context(self, VERIFICATION)
        context.set_shapes(laid_out, self.cache, 0)
        return _CapturedPass(self._cuda, context, self._use_graphs)

    def _check(self, batch: Batch) -> None:
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
        if (longest := max(batch.lengths)) >= limits.max_context:
            raise InputError(
                f"{longest + 1} tokens of context are more than the {limits.max_context} that this plan was "
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
        self._set: tuple[object, ...] = ()
        self._context = self._create(engine._runtime_cache)
        if self._context is None:
            raise EngineError(
                f"the plan cannot be run ({self._log.last_errors()}); the GPU has {self._cuda.free_memory() >> 20} MiB "
                "of memory free: where that is little, load it with a lower gpu_memory_bytes"
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

    def set_shapes(self, laid_out: BatchInputs, cache: DeviceCache, first: int) -> None:
        """Set the shapes of the next passes, which read `cache` from its place `first` on. Raises `InputError` for one
        outside the profile.
        """
        values = laid_out.dims(cache.capacity)
        wanted = (*values.items(), first, self._buffers.generation, cache.generation)
        if wanted == self._set:
            return
        # Half of it may be set when something is wrong.
        self._set = ()
        for binding in self._dims.inputs():
            shape = binding.sizes(values)
            if not self._context.set_input_shape(binding.name, shape):
                least, _, most = self._plan.get_tensor_profile_shape(binding.name, self._profile)
                raise InputError(
                    f"{binding.name} of shape {shape} is outside what this plan was built for, {tuple(least)} to "
                    f"{tuple(most)}; export it again with a larger {_flag(binding.name, self._profile)}"
                )
        for name, address in self._buffers.addresses(cache, first).items():
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
