"""Safetensors files: written whole or not at all, and read when their header is one that somebody can have written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.errors import InputError
from runtime.files import atomic_path
from runtime.formats import Format


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` and `metadata` to `path`, atomically. Raises `InputError` when the disk is full, say."""
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(on_cpu, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            # Its errors are not OSErrors, not even when the disk is full.
            raise InputError(f"cannot write {path} ({error}); choose a writable folder with free space") from error


@contextlib.contextmanager
def opened_tensors(path: Path, described: Format) -> Iterator[Any]:
    """Yield the safetensors file at `path`, as `safe_open` opens it; its header has up to `described.most_bytes`.

    Raises the format's error where the file, or what the block reads of it, is not whole.
    """
    with described.opened(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > described.most_bytes:
        raise described.unfit(path, f"its header is to have {length} bytes, and at most {described.most_bytes} can be")
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise described.unfit(path, error) from error


def shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of an opened file, of which nothing else is read."""
    return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
