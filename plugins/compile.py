"""Tree-attention kernels compiled ahead of time: no GPU is needed here, and no compiler where they run."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_manager

from plugins import choosing
from plugins.binaries import CHOOSE, CHOOSE_DRAFTS, COMBINE, COMMIT, Form, Kernel, KernelBinaries, Variant
from plugins.choose_kernel import collect_kernel, peak_kernel, weigh_kernel
from plugins.kernel import attention_kernel, combine_kernel, commit_rows_kernel
from plugins.specialisations import (
    PLAIN,
    SAME_CODE,
    Specialisation,
    by_architecture,
    of_attention,
    of_choices,
    of_commit,
)
from plugins.tiling import MAX_SPLITS, TILES, Tile

DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
WARP = 32
# The oldest version of the language that has an architecture, where that is newer than 8.0. Asked for an older one, the
# compiler ends the process.
PTX_VERSIONS = {100: 86, 103: 88, 120: 87, 121: 88}
POINTERS = {
    "cache_length": "*i64",
    "tree_mask": "*i8",
    "first_visible": "*i64",
    "maxima": "*fp32",
    "sums": "*fp32",
    "partial": "*fp32",
    "sources": "*i64",
    "targets": "*i64",
    "source_rows": "*i32",
    "lengths": "*i64",
    "accepted": "*i32",
    "counts": "*i32",
    "jobs": "*i64",
    "results": "*i32",
    "tops": "*i32",
    "peaks": "*i32",
}
NUMBERS = {"scale": "fp32", "cap": "fp32", "kv_heads": "i32", "rows": "i32", "packed_rows": "i32", "capacity": "i32",
           "splits": "i32", "first": "i32", "most": "i32", "vocab": "i32", "groups": "i32"}  # fmt: skip
# The name of a cubin in Triton's cache that Triton itself did not put there.
ASSEMBLED = "assembled.cubin"
# Their rows start wherever the row count puts them, or they hold single bytes.
UNALIGNED = ("tree_mask",)


def compile_kernels(
    dtype: str,
    head_dim: int,
    architectures: Iterable[int],
    forms: Collection[Form] = (PLAIN,),
    tiles: Collection[Tile] = TILES,
) -> KernelBinaries:
    """Compile attention of `forms` and `tiles` for each architecture (80 for SM 8.0), one after the other in this
    process.

    Raises `ValueError` for a type, head size or architecture that there is no kernel for.
    """
    return KernelBinaries(dtype, head_dim, _compiled(of_attention(dtype, head_dim, architectures, forms, tiles)))


def compile_commit(dtype: str, head_dim: int, architectures: Iterable[int]) -> KernelBinaries:
    """Compile the copy of accepted rows into the cache, in this process."""
    return KernelBinaries(dtype, head_dim, _compiled(of_commit(dtype, head_dim, architectures)))


def compile_choosing(
    vocab_size: int, architectures: Iterable[int], variants: Sequence[Variant] = CHOOSE
) -> dict[int, dict[Variant, Kernel]]:
    """Compile the choices on the device for rows of V = `vocab_size` logits, by architecture, in this process."""
    return _compiled(of_choices(vocab_size, architectures, variants))


def compile_one(wanted: Specialisation) -> Kernel:
    """Compile one kernel, whichever it is."""
    variant = wanted.variant
    if wanted.vocab_size:
        return _compile_choice(variant, wanted.sm, wanted.vocab_size)
    if variant == COMMIT:
        return _compile_commit(wanted.dtype, wanted.head_dim, wanted.sm)
    if variant == COMBINE:
        return compile_combine(wanted.dtype, wanted.head_dim, wanted.sm)
    return compile_attention(wanted.dtype, wanted.head_dim, wanted.sm, variant.block_m, variant.split, variant.form)


def _compiled(wanted: Sequence[Specialisation]) -> dict[int, dict[Variant, Kernel]]:
    return by_architecture(wanted, {one: compile_one(one) for one in wanted})


@cache
def compile_attention(dtype: str, head_dim: int, sm: int, block_m: int, split: bool, form: Form = PLAIN) -> Kernel:
    """Compile one variant of `attention_kernel`: the first of its tunings that keeps everything in registers."""
    element = f"*{DTYPES[dtype]}"
    types = {"output": "*fp32" if split else element}
    kernels = []
    for tuning in tunings(head_dim, block_m):
        constants = {
            "D": head_dim,
            "BLOCK_D": triton.next_power_of_2(head_dim),
            "BLOCK_M": block_m,
            "BLOCK_N": tuning.block_n,
            "SPLIT": split,
            "WINDOWED": form.windowed,
            "CAPPED": form.capped,
            "UPCAST": False,
        }
        kernel = _compile(attention_kernel, sm, element, types, constants, tuning.warps, tuning.stages)
        if not spilled_bytes(kernel.cubin):
            return kernel
        kernels.append(kernel)
    return min(kernels, key=lambda kernel: spilled_bytes(kernel.cubin))


@cache
def compile_combine(dtype: str, head_dim: int, sm: int) -> Kernel:
    """Compile `combine_kernel`."""
    element = f"*{DTYPES[dtype]}"
    constants = {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_SPLITS": MAX_SPLITS}
    return _compile(combine_kernel, sm, element, {}, constants, 4, 1)


def _compile_commit(dtype: str, head_dim: int, sm: int) -> Kernel:
    element = tl.int32 if dtype == "float32" else tl.int16
    constants = {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "ELEMENT": element}
    return _compile(commit_rows_kernel, sm, "", {}, constants, 1, 1)


def _compile_choice(variant: Variant, sm: int, vocab_size: int) -> Kernel:
    variants = CHOOSE if variant in CHOOSE else CHOOSE_DRAFTS
    kernel = (peak_kernel, weigh_kernel, collect_kernel)[variants.index(variant)]
    return _compile(kernel, sm, "", {}, choosing_constants(kernel.arg_names, vocab_size), 4, 1)


def choosing_constants(names: Collection[str], vocab_size: int, block: int = choosing.BLOCK) -> dict[str, int]:
    """Return the constants of a kernel of choices, which takes those `names`."""
    tiling = choosing.tile(vocab_size, block)
    constants = {
        "BLOCK": tiling.block,
        "GROUP": tiling.group,
        "SPLITS": triton.next_power_of_2(tiling.splits),
        "GROUPS": triton.next_power_of_2(tiling.groups),
    }
    return {name: value for name, value in constants.items() if name in names}


@dataclass(frozen=True)
class Tuning:
    """Columns of a tile, warps of a program, and stages of the pipeline that loads tiles."""

    block_n: int
    warps: int
    stages: int


def tunings(head_dim: int, block_m: int) -> list[Tuning]:
    """Return ways to compile attention, the best first: large tiles, as far as registers go."""
    width = triton.next_power_of_2(head_dim)
    block_n = 64 if 64 <= width <= 128 else 32
    large = block_m * width > 4096
    warps, stages = (8, 2) if large else (4, 3)
    found = [
        Tuning(block_n, warps, stages),
        Tuning(block_n, warps, 2),
        Tuning(32, warps, stages),
        Tuning(32, warps, 2),
        Tuning(32, 12 - warps, 2),
        Tuning(16, warps, 2),
    ]
    return list(dict.fromkeys(found))


def spilled_bytes(cubin: bytes) -> int:
    """Return the bytes of a thread's stack: these kernels have none but for registers that are spilled to it."""
    # Entries of .nv.info: attribute 0x11 (FRAME_SIZE), 8 bytes: the function's index, and its stack's size.
    sizes = re.findall(rb"\x04\x11\x08\x00.{4}(.{4})", cubin, flags=re.DOTALL)
    return max((int.from_bytes(size, "little") for size in sizes), default=0)


def _compile(
    kernel: Any, sm: int, element: str, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int
) -> Kernel:
    names = kernel.arg_names
    known = {**POINTERS, **NUMBERS, **types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: known.get(name, element) for name in names}
    # The engine's buffers start at multiples of 256 bytes.
    aligned = [name for name, kind in signature.items() if kind.startswith("*") and name not in UNALIGNED]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
        "ptx_version": PTX_VERSIONS.get(sm, 80),
    }
    with warnings.catch_warnings(), triton.knobs.compilation.scope():
        warnings.simplefilter("ignore")
        triton.knobs.compilation.store_binary_only = False
        # Line tables would triple the cubin.
        triton.knobs.compilation.disable_line_info = True
        compiled = triton.compile(source, target=GPUTarget("cuda", SAME_CODE.get(sm, sm), WARP), options=options)
        cubin = _assembled(compiled.asm["ptx"], sm, options) if sm in SAME_CODE else compiled.asm["cubin"]
    metadata = compiled.metadata
    assert not metadata.global_scratch_size, "the launcher passes no scratch memory"
    return Kernel(metadata.name, metadata.num_warps * WARP, metadata.shared, cubin)


def _assembled(code: str, sm: int, options: dict[str, Any]) -> bytes:
    """Return the cubin of PTX that was made for another architecture, from Triton's cache where it is there."""
    code = code.replace(f".target sm_{SAME_CODE[sm]}", f".target sm_{sm}")
    backend = make_backend(GPUTarget("cuda", sm, WARP))
    chosen = backend.parse_options(dict(options))
    key = f"{triton.__version__}-{backend.hash()}-{chosen.hash()}-{code}"
    cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    path = cache.get_file(ASSEMBLED)
    if path is None:
        path = cache.put(backend.make_cubin(code, {}, chosen, sm), ASSEMBLED)
    return Path(path).read_bytes()
