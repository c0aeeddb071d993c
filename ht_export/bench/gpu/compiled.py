"""The compiled kernels of tree attention for this machine's GPU, launched through the driver as plans launch them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ht_export.bench.gpu.parts import note
from plugins.binaries import Form
from plugins.launch import Scores


class Kernel:
    """The compiled kernels for this GPU, called with torch tensors."""

    def __init__(self) -> None:
        self._launchers: dict[tuple[str, int, Form], Any] = {}

    def __call__(self, inputs: dict[str, Any], scores: Scores) -> Any:
        """Return the output for the inputs of `make_inputs`."""
        output, launch = self.prepare(inputs, scores)
        launch()
        return output

    def prepare(self, inputs: dict[str, Any], scores: Scores) -> tuple[Any, Callable[[], None]]:
        """Return the output, and what computes it from `inputs` as they are then, on torch's stream."""
        import torch

        from plugins.launch import Buffers, Shapes, workspace_size

        query, cache = inputs["query"], inputs["key_cache"]
        batch, query_heads, rows, head_dim = query.shape
        shapes = Shapes(batch, query_heads, cache.shape[1], rows, cache.shape[2], head_dim)
        form = Form("first_visible" in inputs, bool(scores.softcap))
        launcher = self._launcher(str(query.dtype).removeprefix("torch."), head_dim, form)
        # Not a number, so that what is not written shows.
        workspace = torch.full((workspace_size(shapes, launcher.multiprocessors) // 4,), torch.nan, device=query.device)
        output = torch.full_like(query, torch.nan)

        def launch() -> None:
            addresses = {name: tensor.data_ptr() for name, tensor in inputs.items()}
            buffers = Buffers(**addresses, output=output.data_ptr())
            launcher(shapes, buffers, workspace.data_ptr(), scores, torch.cuda.current_stream().cuda_stream)

        return output, launch

    def _launcher(self, dtype: str, head_dim: int, form: Form) -> Any:
        import torch

        from plugins.binaries import ARCHITECTURES, KernelBinaries, best_architecture
        from plugins.compile import compile_kernels
        from plugins.launch import Launcher

        key = (dtype, head_dim, form)
        if key not in self._launchers:
            note(f"compiling the kernels for {dtype}, head size {head_dim}, {form}")
            sm = best_architecture(*torch.cuda.get_device_capability(), ARCHITECTURES)
            assert sm is not None
            binaries = compile_kernels(dtype, head_dim, [sm], forms=[form])
            self._launchers[key] = Launcher(KernelBinaries.from_bytes(binaries.to_bytes()))
        return self._launchers[key]
