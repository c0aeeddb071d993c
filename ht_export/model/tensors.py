"""Writing safetensors files, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from runtime.errors import InputError
from runtime.files import atomic_path


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` and `metadata` to `path`, atomically. Raises `InputError` when the disk is full, say."""
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(on_cpu, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            # Its errors are not OSErrors, not even when the disk is full.
            raise InputError(f"cannot write {path} ({error}); choose a writable folder with free space") from error
