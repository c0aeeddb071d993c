"""The kernels of tree attention compiled beforehand, which is what takes the longest of checking them."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ht_export.bench.gpu.cases import GRID
from ht_export.bench.gpu.compiled import KernelKey
from plugins.binaries import ARCHITECTURES, Form, KernelBinaries, best_architecture

SUFFIX = ".kernels"


def every_key() -> list[KernelKey]:
    """Return the types, head sizes and forms of the grid, those of the shapes that are timed first."""
    forms = [Form(windowed, capped) for capped, windowed in itertools.product((False, True), repeat=2)]
    return [(dtype, size, form) for form in forms for dtype in GRID["dtype"] for size in GRID["head_dim"]]


def file_name(key: KernelKey) -> str:
    """Return the name of the file of these kernels."""
    dtype, head_dim, form = key
    return f"{dtype}-{head_dim}{'-windowed' * form.windowed}{'-capped' * form.capped}{SUFFIX}"


def compile_into(
    folder: Path, keys: Sequence[KernelKey], architectures: Sequence[int], say: Callable[[str], None]
) -> list[Path]:
    """Compile kernels that the folder lacks; return the files of all."""
    wanted = [key for key in keys if not (folder / file_name(key)).is_file()]
    for number, (key, binaries) in enumerate(_compiled(wanted, architectures), start=1):
        from runtime.files import atomic_path

        with atomic_path(folder / file_name(key)) as temporary:
            temporary.write_bytes(binaries.to_bytes())
        say(f"compiled {number} of {len(wanted)}: {file_name(key)}")
    return [folder / file_name(key) for key in keys]


def held_kernels(
    folder: Path, keys: Sequence[KernelKey], capability: tuple[int, int], *, compile_others: bool = True
) -> dict[KernelKey, KernelBinaries]:
    """Return kernels for a GPU: those that the folder has for it. The others are compiled, in as many processes as
    there are cores, if asked for.
    """
    found = dict(_read(folder, keys, capability))
    others = [key for key in keys if key not in found]
    sm = best_architecture(*capability, ARCHITECTURES)
    if compile_others and others and sm is not None:
        found |= dict(_compiled(others, [sm]))
    return found


def _read(
    folder: Path, keys: Sequence[KernelKey], capability: tuple[int, int]
) -> Iterator[tuple[KernelKey, KernelBinaries]]:
    for key in keys:
        path = folder / file_name(key)
        if not path.is_file():
            continue
        try:
            binaries = KernelBinaries.from_bytes(path.read_bytes())
            binaries.for_device(*capability)
        except (ImportError, ValueError):
            # Without msgspec they cannot be read; and they may be for other GPUs, or damaged: all can be made again.
            continue
        yield key, binaries


def _compiled(keys: Sequence[KernelKey], architectures: Sequence[int]) -> Iterator[tuple[KernelKey, KernelBinaries]]:
    if not keys:
        return
    workers = min(len(keys), os.cpu_count() or 1)
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from zip(keys, pool.map(_compile, keys, itertools.repeat(tuple(architectures))), strict=False)
    finally:
        # Where it is interrupted, what has not begun never does.
        pool.shutdown(cancel_futures=True)


def _compile(key: KernelKey, architectures: Sequence[int]) -> KernelBinaries:
    from plugins.compile import compile_kernels

    dtype, head_dim, form = key
    return compile_kernels(dtype, head_dim, architectures, forms=[form])
