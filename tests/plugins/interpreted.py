"""The kernel under Triton's interpreter, against its definition. Run by `test_kernel`, which sets TRITON_INTERPRET."""

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from ht_export.bench.gpu.interpreted import InterpretedKernel
from plugins.kernel import commit_rows_kernel
from plugins.launch import POINTER, Commit, Scores, commit_launch
from plugins.reference import tree_attention
from runtime.rows import lay_out
from runtime.tree import Tree
from tests.strategies import trees

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


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
    scores = Scores(1 / math.sqrt(head_dim), softcap)
    output = InterpretedKernel(multiprocessors)(inputs, scores)
    arrays: list[Any] = [tensor.float().numpy() for tensor in list(inputs.values())[:5]]
    first = inputs["first_visible"].numpy() if windowed else None
    arrays += [lengths.numpy(), inputs["tree_mask"].numpy(), scores.scale, first, softcap]
    expected = tree_attention(*arrays)
    # Weights and output are rounded to the type, by half of eps of what they are; `atol` is for sums that cancel out.
    np.testing.assert_allclose(output.float().numpy(), expected, atol=TOLERANCE[dtype], rtol=torch.finfo(dtype).eps)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_accepted_rows_of_every_request_are_copied_behind_its_valid_ones(data: st.DataObject) -> None:
    integer = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    element = data.draw(st.sampled_from([tl.int16, tl.int32]))
    dtype = torch.int16 if element is tl.int16 else torch.int32
    batch, kv_heads, head_dim = integer(1, 4), integer(1, 3), data.draw(st.sampled_from([8, 24, 64]))
    tree_rows = integer(1, 6)
    # Pseudo rows join at later layers; accepted rows are of the tree.
    alive = [tree_rows + more for more in data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))]
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
    rows = st.lists(st.integers(0, tree_rows - 1), unique=True)
    accepted = [sorted(data.draw(rows)) for _ in range(batch)]
    # A chunk of a prompt accepts its rows in their order, and a request may accept nothing: all of them must not.
    if not any(accepted):
        accepted[integer(0, batch - 1)] = [integer(0, tree_rows - 1)]
    most = max(map(len, accepted))
    first, behind = integer(0, 2), integer(0, 2)
    capacity = max(lengths) + most + integer(0, 3)
    rng = np.random.default_rng(integer(0, 2**31))
    new, caches = (
        [
            torch.from_numpy(rng.integers(-999, 999, shape)).to(dtype)
            for shape in ((places, kv_heads, rows, head_dim) for rows in counts)
        ]
        for places, counts in ((batch, alive), (first + batch + behind, [capacity] * len(alive)))
    )
    expected = [cache.clone() for cache in caches]
    for source, cache in zip(new, expected, strict=True):
        for request, (length, chosen) in enumerate(zip(lengths, accepted, strict=True)):
            cache[first + request, :, length : length + len(chosen)] = source[request][:, chosen]
    # What lies behind the rows that a request accepts is no row at all.
    table = np.full((batch, most), 1 << 30, dtype=np.int32)
    for request, chosen in enumerate(accepted):
        table[request, : len(chosen)] = chosen
    tensors = {
        -1: torch.tensor([tensor.data_ptr() for tensor in new]),
        -2: torch.tensor([tensor.data_ptr() for tensor in caches]),
        -3: torch.tensor(alive, dtype=torch.int32),
        -4: torch.tensor(lengths),
        -5: torch.from_numpy(table),
        -6: torch.tensor([len(chosen) for chosen in accepted], dtype=torch.int32),
    }
    sources, targets, source_rows, ends, chosen_rows, counts = tensors
    launch = commit_launch(
        Commit(
            sources,
            targets,
            source_rows,
            ends,
            chosen_rows,
            counts,
            arrays=len(alive),
            batch=batch,
            kv_heads=kv_heads,
            first=first,
            most=most,
            capacity=capacity,
        )
    )
    arguments = [tensors[value] if kind is POINTER else value for value, kind in launch.arguments[:-2]]
    width = triton.next_power_of_2(head_dim)
    commit_rows_kernel[launch.grid](*arguments, D=head_dim, BLOCK_D=width, ELEMENT=element)
    for cache, wanted in zip(caches, expected, strict=True):
        assert torch.equal(cache, wanted)
