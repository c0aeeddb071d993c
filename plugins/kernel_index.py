"""The index in a file of compiled kernels, described and checked. `plugins.binaries` reads and writes such files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

# Bytes of a kernel; they take some KiB.
MOST_CUBIN = 1 << 28


@dataclass(frozen=True)
class IndexForm:
    """A form of attention, as `plugins.binaries.Form`."""

    windowed: bool = False
    capped: bool = False


@dataclass(frozen=True)
class Entry:
    """A kernel as the index has it; its cubin of `size` bytes comes after those before it."""

    sm: Annotated[int, Meta(ge=10, le=999)]
    block_m: Annotated[int, Meta(ge=0, le=1024)]
    split: bool
    form: IndexForm
    entry: Annotated[str, Meta(pattern=r"^\w{1,255}\Z")]
    threads: Annotated[int, Meta(ge=1, le=1024)]
    shared_memory: Annotated[int, Meta(ge=0, le=1 << 20)]
    size: Annotated[int, Meta(ge=1, le=MOST_CUBIN)]


@dataclass(frozen=True)
class Index:
    """What comes before the cubins."""

    dtype: Annotated[str, Meta(pattern=r"^(float32|float16|bfloat16)\Z")]
    head_dim: Annotated[int, Meta(ge=1, le=1024)]
    kernels: tuple[Entry, ...]


def parse_index(content: bytes) -> Index:
    """Return the index that `content` is. Raises `ValueError` for anything else."""
    try:
        return msgspec.json.decode(content, type=Index)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
