"""Which kernels there are to compile: plain data, that a process is told, without the compiler."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from plugins.binaries import (
    ARCHITECTURES,
    CHOOSE,
    CHOOSE_DRAFTS,
    COMBINE,
    COMMIT,
    HEAD_DIMS,
    PLUGIN_DTYPES,
    Form,
    Kernel,
    Variant,
)
from plugins.tiling import TILES, Tile

PLAIN = Form()
# Architectures that the compiler makes the same code for as for another one: only assembling that is left. Code (PTX)
# for 8.6 is by its definition good for 8.9.
SAME_CODE = {89: 86}


@dataclass(frozen=True)
class Specialisation:
    """One kernel for one architecture (80 for SM 8.0): attention and the copy of accepted rows for elements of a type
    and a head size D, choices for rows of V = `vocab_size` logits.
    """

    variant: Variant
    sm: int
    dtype: str = ""
    head_dim: int = 0
    vocab_size: int = 0

    @property
    def code(self) -> Specialisation:
        """The kernel whose code this one is assembled from, which may be itself."""
        return replace(self, sm=SAME_CODE.get(self.sm, self.sm))

    def __str__(self) -> str:
        variant, target = self.variant, f"SM {self.sm / 10}"
        if self.vocab_size:
            return f"choices among {self.vocab_size} tokens, {target}"
        if variant == COMMIT:
            return f"the copy of accepted rows, head size {self.head_dim}, {target}"
        kind = "the sum of parts" if variant == COMBINE else f"tiles of {variant.block_m} rows"
        return f"attention, {kind}, {self.dtype}, head size {self.head_dim}, {target}"


def of_attention(
    dtype: str,
    head_dim: int,
    architectures: Iterable[int],
    forms: Collection[Form] = (PLAIN,),
    tiles: Collection[Tile] = TILES,
) -> list[Specialisation]:
    """Return the kernels of attention of `forms`, of the programs `tiles`, for each architecture.

    Raises `ValueError` for a type, head size or architecture that there is no kernel for.
    """
    if dtype not in PLUGIN_DTYPES:
        raise ValueError(f"the tree-attention kernel takes {' or '.join(PLUGIN_DTYPES)}, not {dtype}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"the tree-attention kernel takes head sizes from 16 to 256 that 8 divides, not {head_dim}")
    found = []
    for sm in architectures:
        if sm not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {sm}; known: {', '.join(map(str, ARCHITECTURES))}")
        variants = [Variant(tile.block_m, tile.split, form) for form in forms for tile in TILES if tile in tiles]
        if any(variant.split for variant in variants):
            variants.append(COMBINE)
        found += [Specialisation(variant, sm, dtype, head_dim) for variant in variants]
    return found


def of_commit(dtype: str, head_dim: int, architectures: Iterable[int]) -> list[Specialisation]:
    """Return the copy of accepted rows into the cache, which knows no type but its width."""
    return [Specialisation(COMMIT, sm, dtype, head_dim) for sm in architectures]


def of_choices(
    vocab_size: int, architectures: Iterable[int], variants: Sequence[Variant] = CHOOSE
) -> list[Specialisation]:
    """Return the choices on the device for rows of V = `vocab_size` logits, whole ones (`CHOOSE`) or those of drafts
    (`CHOOSE_DRAFTS`).
    """
    assert variants in (CHOOSE, CHOOSE_DRAFTS)
    return [Specialisation(variant, sm, vocab_size=vocab_size) for sm in architectures for variant in variants]


def by_architecture(
    wanted: Iterable[Specialisation], compiled: Mapping[Specialisation, Kernel]
) -> dict[int, dict[Variant, Kernel]]:
    """Return the kernels `wanted` as `KernelBinaries` has them, in this order, however they came about."""
    found: dict[int, dict[Variant, Kernel]] = {}
    for one in wanted:
        found.setdefault(one.sm, {})[one.variant] = compiled[one]
    return found
