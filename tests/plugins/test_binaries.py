"""Compiled kernels come back from their bytes, and anything else is one error, found at a bounded cost."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import pytest

from plugins import binaries
from plugins.binaries import COMBINE, COMMIT, MAGIC, VERSION, Form, Kernel, KernelBinaries, Variant

BINARIES = KernelBinaries(
    "float16",
    64,
    {
        80: {COMMIT: Kernel("commit_kernel", 32, 0, b"\x7fELF"), COMBINE: Kernel("combine", 64, 8, b"x")},
        90: {Variant(16, True, Form(windowed=True)): Kernel("tree_attention_kernel", 128, 101376, b"yz")},
    },
)
ENTRY = {
    "sm": 80,
    "block_m": 16,
    "split": True,
    "form": {"windowed": False, "capped": False},
    "entry": "kernel",
    "threads": 128,
    "shared_memory": 0,
    "size": 4,
}


ODD: dict[str, tuple[object, ...]] = {
    "sm": (0, -80, 10**9, "80", None),
    "block_m": (-1, 10**9, 1.5),
    "split": (1, None),
    "form": (None, [], {"windowed": 1}),
    "entry": ("", "a b", "a\0", "x" * 1000, 3),
    "threads": (0, 2000, True),
    "shared_memory": (-1, 10**9, 10**30),
    "size": (0, -4, 3, 10**9, 10**30, "4"),
}


def packed(index: Any, cubins: bytes = b"\x7fELF", size: int | None = None) -> bytes:
    about = index if isinstance(index, bytes) else json.dumps(index).encode()
    size = len(about) if size is None else size
    return struct.pack("<4sII", MAGIC, VERSION, size) + zlib.compress(about + cubins)


def index(**changes: object) -> dict[str, object]:
    return {"dtype": "float16", "head_dim": 64, "kernels": [{**ENTRY, **changes}]}


def test_kernels_come_back_from_their_bytes() -> None:
    assert KernelBinaries.from_bytes(BINARIES.to_bytes()) == BINARIES
    assert KernelBinaries.from_bytes(packed(index())).kernels[80].keys() == {Variant(16, True)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"HTTA",
        BINARIES.to_bytes()[:20],
        BINARIES.to_bytes()[:-1],
        BINARIES.to_bytes() + b"x",
        b"junk" + BINARIES.to_bytes()[4:],
        packed(index())[:4] + b"\x01" + packed(index())[5:],
        packed(b""),
        packed(b"[]"),
        packed(b"[" * 100_000),
        packed(b"\xff"),
        packed(index(), size=0),
        packed(index(), size=3),
        packed(index(), size=2**32 - 1),
        packed(index(), cubins=b""),
        packed(index(), cubins=b"\x7fELFx"),
        packed({**index(), "dtype": "float64"}),
        packed({**index(), "head_dim": 10**9}),
        packed({**index(), "kernels": None}),
        packed({**index(), "kernels": [3]}),
        *(packed(index(**{name: value})) for name, values in ODD.items() for value in values),
    ],
)
def test_damaged_kernels_are_one_clear_error(content: bytes) -> None:
    with pytest.raises(
        ValueError, match=r"^(damaged kernels \(.*\)|no kernels in it|kernels of version 1, and this .*)$"
    ):
        KernelBinaries.from_bytes(content)


def test_what_expands_without_end_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "MOST_CONTENT", 1 << 20)
    bomb = zlib.compress(bytes((1 << 20) + 1))
    with pytest.raises(ValueError, match="cut short, or too large"):
        KernelBinaries.from_bytes(struct.pack("<4sII", MAGIC, VERSION, 100) + bomb)
