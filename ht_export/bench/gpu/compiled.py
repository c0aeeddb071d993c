"""The compiled kernels of tree attention for this machine's GPU, launched through the driver as plans launch them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ht_export.bench.gpu.parts import note
from plugins.binaries import Form, KernelBinaries
from plugins.launch import Scores

# Type, head size and form of compiled kernels.
KernelKey = tuple[str, int, Form]


class Kernel:
    """The compiled kernels for this GPU, called with torch tensors: those `held`, others are compiled when they are
    needed.
    """

    def __init__(self, held: Mapping[KernelKey, KernelBinaries] | None = None) -> None:
        self._held = held or {}
        self._launchers: dict[KernelKey, Any] = {}

    def __call__(self, inputs: dict[str, Any], scores: Scores) -> Any:
        """Return the output for the inputs of `make_inputs`."""
        output, launch = self.prepare(inputs, scores)
        launch()
        return output

    def prepare(self, inputs: dict[str, Any], scores: Scores) -> tuple[Any, Callable[[], None]]:
        """Return the output, and what computes it from `inputs` as they are then, on torch's stream."""
        import torch

        output = torch.full_like(inputs["query"], torch.nan)
        # Not a number, so that what is not written shows.
        workspace = self._workspace(inputs, scores).fill_(torch.nan)
        return output, lambda: self._enqueue(inputs, output, workspace, scores)

    def attend(self, inputs: dict[str, Any], scores: Scores) -> Any:
        """Return the output, and enqueue nothing but what computes it."""
        import torch

        output = torch.empty_like(inputs["query"])
        self._enqueue(inputs, output, self._workspace(inputs, scores), scores)
        return output

    def _workspace(self, inputs: dict[str, Any], scores: Scores) -> Any:
        import torch

        from plugins.launch import workspace_size

        launcher = self._launcher(inputs, scores)
        size = workspace_size(_shapes(inputs), launcher.multiprocessors) // 4
        return torch.empty(size, dtype=torch.float32, device=inputs["query"].device)

    def _enqueue(self, inputs: dict[str, Any], output: Any, workspace: Any, scores: Scores) -> None:
        import torch

        from plugins.launch import Buffers

        addresses = {name: tensor.data_ptr() for name, tensor in inputs.items()}
        buffers = Buffers(**addresses, output=output.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream
        self._launcher(inputs, scores)(_shapes(inputs), buffers, workspace.data_ptr(), scores, stream)

    def _launcher(self, inputs: dict[str, Any], scores: Scores) -> Any:
        import torch

        from plugins.binaries import ARCHITECTURES, best_architecture
        from plugins.launch import Launcher

        dtype, head_dim = str(inputs["query"].dtype).removeprefix("torch."), inputs["query"].shape[3]
        key = (dtype, head_dim, Form("first_visible" in inputs, bool(scores.softcap)))
        if key not in self._launchers:
            binaries = self._held.get(key)
            if binaries is None:
                from plugins.compile import compile_kernels

                note(f"compiling the kernels for {dtype}, head size {head_dim}, {key[2]}")
                sm = best_architecture(*torch.cuda.get_device_capability(), ARCHITECTURES)
                assert sm is not None
                binaries = compile_kernels(dtype, head_dim, [sm], forms=[key[2]])
            self._launchers[key] = Launcher(binaries)
        return self._launchers[key]


def _shapes(inputs: dict[str, Any]) -> Any:
    from plugins.launch import Shapes

    batch, query_heads, rows, head_dim = inputs["query"].shape
    kv_heads, capacity = inputs["key_cache"].shape[1:3]
    return Shapes(batch, query_heads, kv_heads, rows, capacity, head_dim)
