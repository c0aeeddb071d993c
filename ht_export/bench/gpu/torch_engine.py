"""The PyTorch reference as an engine: on a GPU with our kernel and captured as CUDA graphs, and on a CPU.

No engine to ship: it needs torch and transformers. It measures the loop, the scheduler, the cache and the kernel on a
GPU for which there is no plan and no ONNX Runtime, and is what those are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ht_export.bench.gpu.torch_device import StreamDevice, TorchDevice
from runtime import Generator, bindings
from runtime.bindings import Dtype, GraphDims
from runtime.bundle.engine_file import Limits
from runtime.bundle.reading import EngineFiles
from runtime.engines.buffers import DeviceResult
from runtime.engines.capturing_engine import CapturingEngine
from runtime.engines.choosing import DeviceChoices
from runtime.engines.cuda import Cuda
from runtime.engines.device_engine import check_rows
from runtime.engines.host_cache import HostCacheEngine, HostResult, caches_of
from runtime.engines.layout import BatchInputs, stack
from runtime.engines.protocol import Batch, Engine
from runtime.errors import InputError
from runtime.rows import Phase
from runtime.tree import TreeSizes

if TYPE_CHECKING:
    from plugins.binaries import KernelBinaries

# A pass: the inputs of `ht_export.model.reference.HiddenTransferModel.forward`, and its outputs.
Forward = Callable[..., Any]

MAX_ROWS, MAX_BATCH = 64, 64
# Of the usual tree, as for plans, and as many pseudo rows of each draft step.
TREE_ROWS = 16
SHARE = (1, 2)
# The first compile what they need, and allocate.
RUNS_BEFORE_CAPTURE = 2


class TorchEngine(CapturingEngine["_Pass"]):
    """`forward`, whose weights are on the current CUDA device, as an engine of passes like a plan's. `kernels` commit,
    and choose; `usual` are the sizes of most passes. Prompts run without a graph.

    `seconds` counts the time that the host waited for passes, or was busy launching them. `device` makes what torch
    does on the engine's stream.
    """

    def __init__(
        self,
        forward: Forward,
        dims: GraphDims,
        limits: Limits,
        usual: TreeSizes,
        kernels: KernelBinaries,
        *,
        use_graphs: bool = True,
        memory_bytes: int | None = None,
        device: Callable[[Cuda], StreamDevice] = TorchDevice,
    ) -> None:
        from plugins.choose_launch import ChooseLauncher
        from plugins.launch import CommitLauncher

        cuda = Cuda()
        super().__init__(cuda, dims, limits, memory_bytes, SHARE, usual, CommitLauncher(kernels))
        self._forward = forward
        self._use_graphs = use_graphs
        self._device = device(cuda)
        choose = ChooseLauncher.of(kernels)
        if choose and dims.draft_size is None:
            self._choices = DeviceChoices(cuda, choose, dims.vocab_size)
        self.seconds = 0.0

    def run(self, batch: Batch) -> DeviceResult:
        """See `Engine.run`."""
        begun = perf_counter()
        found = super().run(batch)
        self.seconds += perf_counter() - begun
        return found

    def _run(self, batch: Batch, laid_out: BatchInputs, first: int) -> None:
        self._buffers.write(laid_out)
        self._buffers.upload()
        if batch.phase is Phase.PROMPT:
            self._device.launch(self._pass_over(laid_out, first))
        else:
            self._pass(laid_out, lambda: self._captured(laid_out)).run()

    def _captured(self, laid_out: BatchInputs) -> _Pass:
        return _Pass(self._pass_over(laid_out, 0), self._device, self._use_graphs, self._refuse)

    def _refuse(self) -> None:
        self.refused += 1

    def _pass_over(self, laid_out: BatchInputs, first: int) -> Callable[[], None]:
        """Return a pass in the shapes of `laid_out`, which reads and writes where the engine's buffers are."""
        values = laid_out.dims(self.cache.capacity)
        addresses = self._buffers.addresses(self.cache, first)
        inputs, outputs = (
            {one.name: self._device.tensor_at(addresses[one.name], one.sizes(values), one.dtype) for one in every}
            for every in (self.dims.inputs(), self.dims.outputs())
        )
        given = _arguments(inputs, self.dims)

        def run() -> None:
            found = self._forward(*given)
            for name, tensor in _named(found, self.dims):
                outputs[name].copy_(tensor)

        return run


@dataclass
class _Pass:
    """A pass of one shape, and its CUDA graph once it has run before."""

    work: Callable[[], None]
    device: StreamDevice
    use_graphs: bool
    refuse: Callable[[], None]
    replay: Callable[[], None] | None = None
    runs: int = 0

    def run(self) -> None:
        """Enqueue it."""
        self.runs += 1
        if self.replay is None and self.use_graphs and self.runs == RUNS_BEFORE_CAPTURE + 1:
            try:
                self.replay = self.device.capture(self.work)
            except RuntimeError:
                # Slower without, and as right.
                self.use_graphs = False
                self.refuse()
        if self.replay is None:
            self.device.launch(self.work)
        else:
            self.replay()


class HostTorchEngine(HostCacheEngine):
    """`forward` on the CPU, with the cache of the engines there."""

    def __init__(self, forward: Forward, dims: GraphDims, limits: Limits) -> None:
        assert dims.dtype == "float32", "on a CPU the reference is computed in float32"
        self.dims = dims
        self.max_batch = limits.max_batch
        self._forward = forward
        self._limits = limits
        self.seconds = 0.0

    def run(self, batch: Batch) -> HostResult:
        """See `Engine.run`: requests one after the other, as each has a cache of its own size."""
        import torch

        check_rows(batch, self._limits)
        begun = perf_counter()
        laid_out = stack(batch.rows, batch.lengths, self.dims.join_order)
        found: list[Any] = []
        with torch.no_grad():
            for place, slot in enumerate(batch.slots):
                keys, values = caches_of(Batch.of([batch.rows[place]], [slot]))
                arrays = {name: value[place : place + 1] for name, value in laid_out.values.items()}
                for layer in range(self.dims.num_layers):
                    arrays[bindings.key_cache(layer)] = keys[layer]
                    arrays[bindings.value_cache(layer)] = values[layer]
                tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
                found.append(dict(_named(self._forward(*_arguments(tensors, self.dims)), self.dims)))
        together = {name: torch.cat([one[name] for one in found]).numpy() for name in found[0]}
        self.seconds += perf_counter() - begun
        layers = range(self.dims.num_layers)
        return HostResult(
            batch,
            together[bindings.LOGITS],
            together[bindings.DRAFT_LOGITS],
            [together[bindings.key_new(layer)] for layer in layers],
            [together[bindings.value_new(layer)] for layer in layers],
            laid_out.pseudo,
        )


class TorchGenerator(Generator):
    """Decoding with the PyTorch reference in the place of a graph: `path` has the other files of an engine, as an
    export writes them or `torch_bundle.write_bundle`.

    `model` is the base model and its transfer layers as `HiddenTransferModel`, on the device that it is to run on.
    """

    def __init__(self, path: Path, model: Any, *, max_batch: int = 16, use_graphs: bool = True, **options: Any) -> None:
        self.path = path
        self._model = model
        self._use_graphs = use_graphs
        self._most_batch = max_batch
        super().__init__(path, max_batch=max_batch, prefix_cache_bytes=0, **options)

    def _open(
        self, files: EngineFiles, device: str | None, threads: int | None, gpu_memory_bytes: int | None
    ) -> Engine:
        weight = next(self._model.parameters())
        name = str(weight.dtype).removeprefix("torch.")
        dims = replace(self.about.dims, dtype=cast(Dtype, name))
        self.about = about = replace(self.about, dims=dims, precision=name)
        limits = Limits(min(MAX_BATCH, self._most_batch), about.max_context, MAX_ROWS, about.prompt_chunk)
        if weight.device.type == "cpu":
            return HostTorchEngine(self._model, about.dims, limits)
        return gpu_engine(self._model, about.dims, limits, about.tree, self._use_graphs, gpu_memory_bytes)


def gpu_engine(
    model: Any, dims: GraphDims, limits: Limits, usual: TreeSizes, use_graphs: bool, memory_bytes: int | None = None
) -> TorchEngine:
    """Return the engine of a model on the GPU, with kernels compiled for that."""
    import torch

    from plugins.binaries import COMMIT_ARCHITECTURES, KernelBinaries, best_architecture
    from plugins.compile import compile_choosing, compile_commit

    sm = best_architecture(*torch.cuda.get_device_capability(), COMMIT_ARCHITECTURES)
    if sm is None:
        raise InputError("there are no kernels for this GPU")
    commit = compile_commit(dims.dtype, dims.head_dim, [sm]).kernels[sm]
    choose = compile_choosing(dims.vocab_size, [sm])[sm]
    kernels = KernelBinaries(dims.dtype, dims.head_dim, {sm: {**commit, **choose}})
    return TorchEngine(model, dims, limits, usual, kernels, use_graphs=use_graphs, memory_bytes=memory_bytes)


def reference_attention(kernel: Any) -> Callable[..., Any]:
    """Return our kernel as the attention of `HiddenTransferModel`."""
    from plugins.launch import Scores

    names = ("query", "key_new", "value_new", "key_cache", "value_cache", "cache_length", "tree_mask", "first_visible")

    def attend(*given: Any) -> Any:
        *tensors, how = given
        named = {name: one.contiguous() for name, one in zip(names, tensors, strict=True) if one is not None}
        return kernel.attend(named, Scores(how.scale, how.softcap or 0.0))

    return attend


def _arguments(inputs: dict[str, Any], dims: GraphDims) -> list[Any]:
    """Return the arguments of a pass, of the graph's inputs by name."""
    return [
        inputs[bindings.INPUT_IDS],
        inputs[bindings.POSITION_IDS],
        inputs[bindings.TREE_MASK],
        [inputs[bindings.pseudo_parent(step + 1)] for step in range(dims.num_steps)],
        inputs[bindings.LOGIT_ROWS],
        inputs[bindings.CACHE_LENGTH],
        [inputs[bindings.key_cache(layer)] for layer in range(dims.num_layers)],
        [inputs[bindings.value_cache(layer)] for layer in range(dims.num_layers)],
    ]


def _named(found: Any, dims: GraphDims) -> list[tuple[str, Any]]:
    """Return the outputs of a pass by the graph's names."""
    every = [(bindings.LOGITS, found.logits.float()), (bindings.DRAFT_LOGITS, found.draft_logits.float())]
    for layer in range(dims.num_layers):
        every += [
            (bindings.key_new(layer), found.key_new[layer]),
            (bindings.value_new(layer), found.value_new[layer]),
        ]
    return every
