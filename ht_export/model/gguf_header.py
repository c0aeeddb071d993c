"""The header of a GGUF file, walked through before any library reads it.

Libraries believe its counts and lengths, and some make lists of them. Here nothing is kept but the single values, and
the walk ends with the file.
"""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Annotated, BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from msgspec import Meta, Struct

from ht_export.model.stated import (
    FETCH_AGAIN,
    Base,
    Epsilon,
    Heads,
    HeadWidth,
    InnerWidth,
    Layers,
    Positions,
    StoredWeights,
    Vocabulary,
    Width,
    Window,
)
from runtime.formats import Format

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Each limit is far above any file's.
MOST_FIELDS = 1 << 16
MOST_TENSORS = 1 << 20
MOST_NAME = 1 << 16
MOST_TEXT = 1 << 24
# Of all arrays together: libraries take some hundred bytes for each.
MOST_ELEMENTS = 1 << 22
MOST_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
MOST_ALIGNMENT = 1 << 20

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9

GGUF = Format("GGUF file", 1 << 30, FETCH_AGAIN)

Value = int | float | bool | str


class _Fields(
    Struct,
    frozen=True,
    kw_only=True,
    rename={
        "head_count": "attention.head_count",
        "head_count_kv": "attention.head_count_kv",
        "key_length": "attention.key_length",
        "value_length": "attention.value_length",
        "sliding_window": "attention.sliding_window",
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
        "layer_norm_rms_epsilon": "attention.layer_norm_rms_epsilon",
        "rope_dimension_count": "rope.dimension_count",
        "rope_freq_base": "rope.freq_base",
        "rope_scaling_factor": "rope.scaling.factor",
        "rope_scaling_original": "rope.scaling.original_context_length",
    },
):
    """Fields with the name of an architecture before theirs; where one is an array for the layers it is not here."""

    block_count: Layers | None = None
    embedding_length: Width | None = None
    feed_forward_length: InnerWidth | None = None
    vocab_size: Vocabulary | None = None
    context_length: Positions | None = None
    head_count: Heads | None = None
    head_count_kv: Heads | None = None
    key_length: HeadWidth | None = None
    value_length: HeadWidth | None = None
    sliding_window: Window | None = None
    layer_norm_epsilon: Epsilon | None = None
    layer_norm_rms_epsilon: Epsilon | None = None
    rope_dimension_count: HeadWidth | None = None
    rope_freq_base: Base | None = None
    rope_scaling_factor: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    rope_scaling_original: Positions | None = None


def check_header(path: Path) -> StoredWeights:
    """Return what the GGUF file at `path` holds.

    Raises `InputError` for a header that leads beyond the file, or states what no model has.
    """
    with GGUF.opened(path) as file:
        walk = _Walk(path, file)
        tensors, count = walk.begin()
        values = walk.values(count)
        named: dict[str, dict[str, Value]] = defaultdict(dict)
        for name, value in values.items():
            prefix, _, rest = name.partition(".")
            named[prefix][rest] = value
        # Not of the stated architecture alone: fields of another are taken too.
        for prefix, group in named.items():
            if prefix not in ("general", "tokenizer"):
                GGUF.fit(group, _Fields, f"{path}, {prefix}")
        return walk.tensors(tensors, values.get("general.alignment", DEFAULT_ALIGNMENT))


class _Walk:
    """A walk through a header, from its first byte on."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._place = 0
        self._elements = 0

    def begin(self) -> tuple[int, int]:
        """Return the numbers of tensors and of fields."""
        magic = self._read(4)
        version, tensors, count = self._numbers("IQQ")
        if magic != MAGIC or version not in VERSIONS:
            raise GGUF.unfit(self._path, f"it is of version {version}; {' and '.join(map(str, VERSIONS))} are read")
        self._check("number of fields", count, MOST_FIELDS)
        self._check("number of tensors", tensors, MOST_TENSORS)
        return tensors, count

    def values(self, count: int) -> dict[str, Value]:
        """Return single values of the fields by name; arrays are passed over."""
        found: dict[str, Value] = {}
        for _ in range(count):
            name = self._text("name of a field", MOST_NAME)
            if name in found:
                raise GGUF.unfit(self._path, f"it has two fields {name!r:.60}")
            (kind,) = self._numbers("I")
            if kind == ARRAY:
                self._pass_array(name)
            elif kind == TEXT:
                found[name] = self._text(f"field {name!r:.60}", MOST_TEXT)
            else:
                (found[name],) = self._numbers(self._scalar(name, kind))
        return found

    def tensors(self, count: int, alignment: Value) -> StoredWeights:
        """Return what `count` tensors hold together; each must lie in the file."""
        parameters, ends = 0, []
        for _ in range(count):
            name = self._text("name of a tensor", MOST_NAME)
            (dimensions,) = self._numbers("I")
            self._check(f"number of dimensions of {name!r:.60}", dimensions, MOST_DIMENSIONS)
            sizes = self._numbers(f"{dimensions}Q")
            kind, offset = self._numbers("IQ")
            if kind not in GGML_QUANT_SIZES:
                raise GGUF.unfit(self._path, f"tensor {name!r:.60} is of the unknown type {kind}")
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            parameters += prod(sizes)
            ends.append((offset + prod(sizes) // block * block_bytes, name))
        if not isinstance(alignment, int) or not 1 <= alignment <= MOST_ALIGNMENT:
            raise GGUF.unfit(self._path, f"general.alignment is {alignment!r:.60}, and 1 to {MOST_ALIGNMENT} can be")
        start = -(-self._place // alignment) * alignment
        end, last = max(ends, default=(0, ""))
        if start + end > self._size:
            raise GGUF.unfit(self._path, f"tensor {last!r:.60} ends at byte {start + end} of {self._size}")
        return StoredWeights(parameters, count)

    def _pass_array(self, name: str) -> None:
        kind, count = self._numbers("IQ")
        self._elements += count
        self._check(f"number of elements up to {name!r:.60}", self._elements, MOST_ELEMENTS)
        if kind == TEXT:
            for _ in range(count):
                (length,) = self._numbers("Q")
                self._pass(length)
        else:
            self._pass(count * struct.calcsize(f"<{self._scalar(name, kind)}"))

    def _scalar(self, name: str, kind: int) -> str:
        if kind not in SCALARS:
            raise GGUF.unfit(self._path, f"field {name!r:.60} is of the unknown or nested type {kind}")
        return SCALARS[kind]

    def _text(self, what: str, most: int) -> str:
        (length,) = self._numbers("Q")
        self._check(f"length of the {what}", length, most)
        try:
            return self._read(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise GGUF.unfit(self._path, f"{what}: {error}") from error

    def _numbers(self, layout: str) -> tuple[int, ...]:
        layout = f"<{layout}"
        return struct.unpack(layout, self._read(struct.calcsize(layout)))

    def _read(self, length: int) -> bytes:
        content = self._file.read(length)
        self._place += length
        if len(content) < length:
            raise self._cut()
        return content

    def _pass(self, length: int) -> None:
        self._place += length
        if self._place > self._size:
            raise self._cut()
        self._file.seek(self._place)

    def _check(self, what: str, value: int, most: int) -> None:
        if value > most:
            raise GGUF.unfit(self._path, f"the {what} is {value}, and at most {most} can be")

    def _cut(self) -> Exception:
        return GGUF.unfit(self._path, f"its header goes on after its {self._size} bytes")
