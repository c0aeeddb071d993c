"""Blocks of a base model that a draft leaves out (self-speculative decoding, arXiv 2309.08168), and their file.

A layer has two blocks, attention and MLP, each added to the stream; without a block the stream passes as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from ht_export.formats import VersionedFormat
from runtime.bindings import MOST_LAYERS
from runtime.errors import InputError, one_line, shown
from runtime.files import write_json

KINDS = ("attention", "mlp")
FORMAT: Literal["ht-skipped-blocks"] = "ht-skipped-blocks"
VERSION = 1
# More tokens in a row are hardly ever all right.
MOST_DRAFTED = 64

Layers = Annotated[list[Annotated[int, Meta(ge=0, lt=MOST_LAYERS)]], Meta(max_length=MOST_LAYERS)]


@dataclass(frozen=True)
class Blocks:
    """Blocks that are left out: the layers whose `attention`, and those whose `mlp`, ascending, 0-based."""

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    @classmethod
    def of(cls, chosen: Sequence[tuple[str, int]]) -> Blocks:
        """Return the blocks named by kind and layer."""
        return cls(*(tuple(sorted(layer for kind, layer in chosen if kind == one)) for one in KINDS))

    @property
    def chosen(self) -> tuple[tuple[str, int], ...]:
        """The blocks by kind and layer; see `of`."""
        return tuple((kind, layer) for kind in KINDS for layer in getattr(self, kind))

    def check(self, num_layers: int) -> None:
        """Raise `InputError` unless they can be left out of a model of so many layers, which still attends once."""
        for kind in KINDS:
            layers = getattr(self, kind)
            if list(layers) != sorted(set(layers)) or any(not 0 <= layer < num_layers for layer in layers):
                raise InputError(
                    f"{kind} is left out of layers {list(layers)[:8]}; layers must ascend, within 0 to {num_layers - 1}"
                )
        if len(self.attention) == num_layers:
            raise InputError("attention is left out of every layer; a draft that sees no text is of no use: leave one")

    def kept_attention(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers that attend."""
        return tuple(layer for layer in range(num_layers) if layer not in self.attention)


@dataclass(frozen=True)
class SkippedBlocks:
    """The blocks `attention` and `mlp` of these layers are left out of the base model of that name and weights, for
    drafts of up to `draft_tokens` tokens in a row, of which one that has less than `confidence` is the last. `search`
    tells how they were found.
    """

    format: Literal["ht-skipped-blocks"]
    version: int
    base_model: str
    weights_sha256: str
    attention: Layers
    mlp: Layers
    draft_tokens: Annotated[int, Meta(ge=1, le=MOST_DRAFTED)]
    confidence: Annotated[float, Meta(ge=0, le=1)]
    search: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        blocks: Blocks,
        base_model: dict[str, Any],
        draft_tokens: int,
        confidence: float,
        search: dict[str, Any],
    ) -> SkippedBlocks:
        """Return what is to be written of a base model; see `BaseModel.identity`."""
        name, sha256 = base_model["name"], base_model["weights_sha256"]
        left_out = list(blocks.attention), list(blocks.mlp)
        return cls(FORMAT, VERSION, name, sha256, *left_out, draft_tokens, confidence, search)

    @property
    def blocks(self) -> Blocks:
        """What is left out."""
        return Blocks(tuple(self.attention), tuple(self.mlp))


SKIPPED_BLOCKS = VersionedFormat(
    "file of skipped blocks",
    most_bytes=1 << 20,
    remedy="search them again with ht-train skip-blocks",
    kind=SkippedBlocks,
    version=VERSION,
    again="search them again with ht-train skip-blocks",
)


def write_skipped_blocks(path: Path, found: SkippedBlocks) -> None:
    """Write the file, atomically."""
    write_json(path, {name: getattr(found, name) for name in SkippedBlocks.__dataclass_fields__})


def read_skipped_blocks(path: Path, base_model: dict[str, Any]) -> SkippedBlocks:
    """Read the file for a base model (see `BaseModel.identity`). Raises `InputError` unless it is for that one."""
    if not path.is_file():
        raise InputError(f"no file of skipped blocks at {path}; search them with ht-train skip-blocks")
    found = SKIPPED_BLOCKS.read(path)
    if found.weights_sha256 != base_model["weights_sha256"]:
        raise InputError(
            f"{path} is of {one_line(found.base_model)} with weights {shown(found.weights_sha256)}, and the engine of "
            f"{base_model['name']} with {shown(base_model['weights_sha256'])}; search them for this model with "
            "ht-train skip-blocks"
        )
    try:
        found.blocks.check(base_model["num_layers"])
    except InputError as error:
        raise SKIPPED_BLOCKS.unfit(path, error) from error
    return found
