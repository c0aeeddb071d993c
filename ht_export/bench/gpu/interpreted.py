"""The kernels of tree attention in Triton's interpreter, with tensors on the CPU: what they compute, and no speed.

The process must have TRITON_INTERPRET=1 in its environment before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from plugins.launch import POINTER, Buffers, Launch, Scores, Shapes, launches, workspace_size

# As many multiprocessors as a small GPU has: enough of them for a cache to be split.
MULTIPROCESSORS = 16
# Addresses stand for tensors: multiples of this for inputs, what follows `WORKSPACE` for places in the workspace.
STEP, WORKSPACE = 1000, 1 << 40


class InterpretedKernel:
    """As `ht_export.bench.gpu.compiled.Kernel`, on the CPU, as if for a GPU of so many multiprocessors."""

    def __init__(self, multiprocessors: int = MULTIPROCESSORS) -> None:
        self._multiprocessors = multiprocessors

    def __call__(self, inputs: dict[str, Any], scores: Scores) -> Any:
        """Return the output for the inputs of `make_inputs`."""
        output, launch = self.prepare(inputs, scores)
        launch()
        return output

    def prepare(self, inputs: dict[str, Any], scores: Scores) -> tuple[Any, Callable[[], None]]:
        """Return the output, and what computes it from `inputs` as they are then."""
        import torch

        batch, query_heads, rows, head_dim = inputs["query"].shape
        kv_heads, capacity = inputs["key_cache"].shape[1:3]
        shapes = Shapes(batch, query_heads, kv_heads, rows, capacity, head_dim)
        output = torch.full_like(inputs["query"], torch.nan)
        workspace = torch.full((max(1, workspace_size(shapes, self._multiprocessors) // 4),), torch.nan)

        def launch() -> None:
            named = {**inputs, "output": output}
            addresses = {name: -STEP * (index + 1) for index, name in enumerate(named)}
            tensors = {addresses[name]: tensor for name, tensor in named.items()}
            tensors[addresses["tree_mask"]] = inputs["tree_mask"].view(torch.int8)
            tensors[0] = workspace
            for one in launches(shapes, Buffers(**addresses), WORKSPACE, scores, self._multiprocessors):
                for value, kind in one.arguments[:-2]:
                    if kind is POINTER and value >= WORKSPACE:
                        tensors[value] = workspace[(value - WORKSPACE) // 4 :]
                _interpret(one, head_dim, tensors, upcast=inputs["query"].dtype != torch.float32)

        return output, launch

    attend = __call__


def _interpret(launch: Launch, head_dim: int, tensors: dict[int, Any], *, upcast: bool) -> None:
    import triton

    from plugins.compile import tunings
    from plugins.kernel import attention_kernel, combine_kernel
    from plugins.tiling import MAX_SPLITS

    # All but the two pointers to scratch memory, which only compiled kernels have.
    arguments = [tensors[value] if kind is POINTER else value for value, kind in launch.arguments[:-2]]
    width = triton.next_power_of_2(head_dim)
    block_m = launch.variant.block_m
    if not block_m:
        combine_kernel[launch.grid](*arguments, D=head_dim, BLOCK_D=width, BLOCK_SPLITS=MAX_SPLITS)
        return
    attention_kernel[launch.grid](
        *arguments,
        D=head_dim,
        BLOCK_D=width,
        BLOCK_M=block_m,
        BLOCK_N=tunings(head_dim, block_m)[0].block_n,
        SPLIT=launch.variant.split,
        WINDOWED=launch.variant.form.windowed,
        CAPPED=launch.variant.form.capped,
        UPCAST=upcast,
    )
