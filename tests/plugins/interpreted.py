"""The kernel under Triton's interpreter, against its definition. Run by `test_kernel`, which sets TRITON_INTERPRET."""

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.compile import tunings
from plugins.kernel import attention_kernel, combine_kernel, commit_kernel
from plugins.launch import POINTER, Buffers, Launch, Scores, Shapes, launches, workspace_size
from plugins.reference import tree_attention
from runtime.rows import lay_out
from runtime.tree import Tree
from tests.strategies import trees

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def run(launch: Launch, shapes: Shapes, tensors: dict[int, torch.Tensor], upcast: bool) -> None:
    """Do in the interpreter what the launcher does on a GPU."""
    kernel = attention_kernel if launch.variant.block_m else combine_kernel
    # All but the two pointers to scratch memory, which only compiled kernels have.
    arguments = [tensors[value] if kind is POINTER else value for value, kind in launch.arguments[:-2]]
    width = triton.next_power_of_2(shapes.head_dim)
    if kernel is combine_kernel:
        kernel[launch.grid](*arguments, D=shapes.head_dim, BLOCK_D=width, BLOCK_SPLITS=32)
        return
    block_m = launch.variant.block_m
    kernel[launch.grid](
        *arguments,
        D=shapes.head_dim,
        BLOCK_D=width,
        BLOCK_M=block_m,
        BLOCK_N=tunings(shapes.head_dim, block_m)[0].block_n,
        SPLIT=launch.variant.split,
        WINDOWED=launch.variant.form.windowed,
        CAPPED=launch.variant.form.capped,
        UPCAST=upcast,
    )


@settings(deadline=None, max_examples=40)
@given(
    trees(max_rows=12),
    st.integers(1, 3),
    st.sampled_from([(1, 1), (2, 1), (3, 2), (1, 4), (8, 1)]),
    st.sampled_from([16, 32, 64, 80, 128, 256]),
    st.sampled_from([0, 1, 63, 64, 65, 300, 520]),
    st.sampled_from(list(TOLERANCE)),
    st.sampled_from([1, 108]),
    st.booleans(),
    st.sampled_from([0.0, 0.7]),
    st.integers(0, 2**31),
)
def test_the_kernel_computes_its_definition(
    tree: Tree,
    batch: int,
    heads: tuple[int, int],
    head_dim: int,
    capacity: int,
    dtype: torch.dtype,
    multiprocessors: int,
    windowed: bool,
    softcap: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    group, kv_heads = heads
    rows = len(tree)
    shapes = Shapes(batch, group * kv_heads, kv_heads, rows, capacity, head_dim)

    def random(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)

    lengths = torch.from_numpy(rng.integers(0, capacity + 1, batch))
    inputs = {
        "query": random(batch, group * kv_heads, rows, head_dim),
        "key_new": random(batch, kv_heads, rows, head_dim),
        "value_new": random(batch, kv_heads, rows, head_dim),
        "key_cache": random(batch, kv_heads, capacity, head_dim),
        "value_cache": random(batch, kv_heads, capacity, head_dim),
        "cache_length": lengths,
        "tree_mask": torch.from_numpy(np.stack([lay_out(tree, (), (), 0).tree_mask] * batch)),
    }
    if windowed:
        # Some rows see all of the cache, some a part, some nothing.
        inputs["first_visible"] = torch.from_numpy(rng.integers(-9, capacity + 9, (batch, rows)))
    for b, length in enumerate(lengths.tolist()):
        # Rows behind the valid ones must not be read.
        inputs["key_cache"][b, :, length:] = float("nan")
        inputs["value_cache"][b, :, length:] = float("nan")
    output = torch.full_like(inputs["query"], float("nan"))
    workspace = torch.full((max(1, workspace_size(shapes, multiprocessors) // 4),), float("nan"))
    # Addresses of the launches stand for tensors here: multiples of 1000 for inputs, byte offsets for the workspace.
    named = {**inputs, "output": output}
    addresses = {name: -1000 * (index + 1) for index, name in enumerate(named)}
    base = 1 << 40
    tensors = {addresses[name]: tensor for name, tensor in named.items()}
    tensors[addresses["tree_mask"]] = inputs["tree_mask"].view(torch.int8)
    tensors[0] = workspace
    scores = Scores(1 / math.sqrt(head_dim), softcap)
    for launch in launches(shapes, Buffers(**addresses), base, scores, multiprocessors):
        for value, kind in launch.arguments[:-2]:
            if kind is POINTER and value >= base:
                tensors[value] = workspace[(value - base) // 4 :]
        run(launch, shapes, tensors, upcast=dtype != torch.float32)
    arrays: list[Any] = [tensor.float().numpy() for tensor in list(inputs.values())[:5]]
    first = inputs["first_visible"].numpy() if windowed else None
    arrays += [lengths.numpy(), inputs["tree_mask"].numpy(), scores.scale, first, softcap]
    expected = tree_attention(*arrays)
    np.testing.assert_allclose(output.float().numpy(), expected, atol=TOLERANCE[dtype])


def test_accepted_rows_are_copied_behind_the_valid_ones() -> None:
    rng = np.random.default_rng(0)
    kv_heads, capacity, head_dim, length = 3, 40, 24, 17
    alive, accepted = (9, 9, 14, 14), (0, 2, 5)
    new = [torch.from_numpy(rng.integers(0, 99, (kv_heads, rows, head_dim)).astype(np.int16)) for rows in alive]
    caches = [torch.zeros(kv_heads, capacity, head_dim, dtype=torch.int16) for _ in alive]
    addresses = [torch.tensor([tensor.data_ptr() for tensor in tensors]) for tensors in (new, caches)]
    commit_kernel[(len(accepted), kv_heads, len(alive))](
        *addresses,
        torch.tensor(alive, dtype=torch.int32),
        torch.tensor(accepted, dtype=torch.int32),
        length,
        capacity,
        D=head_dim,
        BLOCK_D=32,
        ELEMENT=tl.int16,
    )
    for source, cache in zip(new, caches, strict=True):
        assert torch.equal(cache[:, length : length + 3], source[:, list(accepted)])
        assert not cache[:, :length].any()
        assert not cache[:, length + 3 :].any()
