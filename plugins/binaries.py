"""Compiled kernels as they travel inside a plan: one cubin for each kernel variant and GPU architecture."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass

# Types, head sizes and GPU architectures (SM) that there are kernels for.
PLUGIN_DTYPES = ("float16", "bfloat16")
HEAD_DIMS = range(16, 257, 8)
ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120, 121)

# The copy of accepted rows runs on older ones too, beside TensorRT's own attention.
COMMIT_ARCHITECTURES = (75, *ARCHITECTURES)

VERSION = 2
MAGIC = b"HTTA"
_HEADER = struct.Struct("<4sII")
# Bytes of all kernels together when they are no longer compressed; they take some MiB.
MOST_CONTENT = 1 << 28


@dataclass(frozen=True)
class Form:
    """A form of attention: with a window or without, with a soft cap or without."""

    windowed: bool = False
    capped: bool = False


@dataclass(frozen=True)
class Variant:
    """A kernel: attention of a form, of `block_m` packed rows a program, over a split cache or not; or one of those
    below.
    """

    block_m: int
    split: bool
    form: Form = Form()


def best_architecture(major: int, minor: int, held: Iterable[int]) -> int | None:
    """Return which of the architectures `held` a GPU of compute capability `major`.`minor` runs best, or None.

    A cubin runs on later minor versions of its major one, but for those of 9.0 and later, which are specific.
    """
    capability = 10 * major + minor
    return max((sm for sm in held if sm == capability or (sm // 10 == major < 9 and sm <= capability)), default=None)


COMBINE = Variant(0, True)
COMMIT = Variant(0, False)
# The name of the copy of accepted rows. Earlier releases had one under another name, which took other parameters.
COMMIT_ENTRY = "commit_rows_kernel"
# Choices on the device: the largest logits, their weights or scores, what is collected.
PEAK, WEIGH, COLLECT = CHOOSE = (Variant(1, False), Variant(1, True), Variant(2, False))
# The same for rows of draft logits, where these are of a part of the vocabulary: kernels are made for a length of rows.
CHOOSE_DRAFTS = (Variant(3, False), Variant(3, True), Variant(4, False))


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: `entry` is its name in `cubin`; threads of a program; bytes of dynamic shared memory."""

    entry: str
    threads: int
    shared_memory: int
    cubin: bytes


@dataclass(frozen=True)
class KernelBinaries:
    """The kernels for one element type ("float16" or "bfloat16") and head size D, by architecture (80 for SM 8.0)."""

    dtype: str
    head_dim: int
    kernels: dict[int, dict[Variant, Kernel]]

    def for_device(self, major: int, minor: int) -> dict[Variant, Kernel]:
        """Return the kernels that a GPU of compute capability `major`.`minor` runs; see `best_architecture`.

        Raises `ValueError` when there are none.
        """
        fitting = best_architecture(major, minor, self.kernels)
        if fitting is None:
            held = ", ".join(f"{sm // 10}.{sm % 10}" for sm in sorted(self.kernels))
            raise ValueError(
                f"its kernels were compiled for compute capabilities {held}, and this GPU has "
                f"{major}.{minor}; export it again with --compute-capability {major}.{minor}"
            )
        return self.kernels[fitting]

    def to_bytes(self) -> bytes:
        """Return these kernels compressed."""
        cubins: list[bytes] = []
        index = []
        for sm, variants in sorted(self.kernels.items()):
            for variant, kernel in variants.items():
                fields = {name: value for name, value in asdict(kernel).items() if name != "cubin"}
                index.append({"sm": sm, **asdict(variant), **fields, "size": len(kernel.cubin)})
                cubins.append(kernel.cubin)
        about = json.dumps({"dtype": self.dtype, "head_dim": self.head_dim, "kernels": index}).encode()
        return _HEADER.pack(MAGIC, VERSION, len(about)) + zlib.compress(about + b"".join(cubins), level=9)

    @classmethod
    def from_bytes(cls, data: bytes) -> KernelBinaries:
        """Return the kernels of `to_bytes`. Raises `ValueError` when they are damaged or of another version."""
        # What checks them is needed to read kernels, and neither to compile nor to launch them.
        from plugins.kernel_index import parse_index

        if len(data) < _HEADER.size:
            raise ValueError("damaged kernels (they are cut short)")
        magic, version, size = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise ValueError("no kernels in it")
        if version != VERSION:
            raise ValueError(f"kernels of version {version}, and this release reads version {VERSION}")
        try:
            content = _decompressed(data[_HEADER.size :])
            index = parse_index(content[:size])
        except (zlib.error, ValueError, RecursionError) as error:
            raise ValueError(f"damaged kernels ({error})") from error
        kernels: dict[int, dict[Variant, Kernel]] = {}
        start = size
        for entry in index.kernels:
            cubin = content[start : start + entry.size]
            start += entry.size
            kernel = Kernel(entry.entry, entry.threads, entry.shared_memory, cubin)
            form = Form(entry.form.windowed, entry.form.capped)
            kernels.setdefault(entry.sm, {})[Variant(entry.block_m, entry.split, form)] = kernel
        if start != len(content):
            raise ValueError("damaged kernels (they are cut short)")
        return cls(index.dtype, index.head_dim, kernels)


def _decompressed(data: bytes) -> bytes:
    """Return what `zlib` compressed. Raises `ValueError` when it is not whole, or too large to be kernels."""
    stream = zlib.decompressobj()
    content = stream.decompress(data, MOST_CONTENT)
    if not stream.eof or stream.unused_data:
        raise ValueError("they are cut short, or too large")
    return content
