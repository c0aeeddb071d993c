"""Tiling of a tree attention into programs: by shapes alone, so that a captured CUDA graph stays right."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_M = (16, 32, 64)
BLOCK_N = 64
MAX_SPLITS = 32
# Programs that a multiprocessor is given before the cache is not split any further.
PROGRAMS_PER_MULTIPROCESSOR = 2
# The most that are used of any GPU: a plan is built for no GPU in particular, and plans its workspace by this.
MOST_MULTIPROCESSORS = 192
# Columns of the cache below which a split is not worth its combination.
LEAST_COLUMNS = 256
# The workspace's parts are aligned to so many floats.
ALIGNMENT = 4


@dataclass(frozen=True)
class Tiling:
    """`block_m` packed rows a program, the cache in `splits` parts."""

    block_m: int
    row_blocks: int
    splits: int


def tile(batch: int, kv_heads: int, packed_rows: int, capacity: int, multiprocessors: int) -> Tiling:
    """Return how to run G * R = `packed_rows` rows of each key/value head over a cache of S = `capacity` rows."""
    multiprocessors = min(multiprocessors, MOST_MULTIPROCESSORS)
    block_m = next((size for size in BLOCK_M if packed_rows <= size), BLOCK_M[-1])
    row_blocks = _ceil(packed_rows, block_m)
    wanted = _ceil(multiprocessors * PROGRAMS_PER_MULTIPROCESSOR, batch * kv_heads * row_blocks)
    splits = max(1, min(wanted, MAX_SPLITS, capacity // LEAST_COLUMNS))
    return Tiling(block_m, row_blocks, splits)


@dataclass(frozen=True)
class Tile:
    """What a kernel is compiled for: `block_m` packed rows a program, over a part of the cache or over all of it."""

    block_m: int
    split: bool


# All that there are.
TILES = tuple(Tile(block_m, split) for block_m in BLOCK_M for split in (False, True))


def reachable_tiles(group: int, kv_heads: int, most_rows: int, most_capacity: int) -> list[Tile]:
    """Return what `tile` may ask for with G = `group` query heads for each of `kv_heads`, up to R = `most_rows` rows
    and S = `most_capacity` rows of the cache, in batches of any size, on any GPU.

    A plan of short contexts never splits its cache; one of wide groups never has few packed rows.
    """
    found = set()
    for rows in range(1, most_rows + 1):
        # Splits grow with the cache and the GPU, and shrink as the batch grows: these are the least, and the most.
        for capacity, multiprocessors in ((0, 1), (most_capacity, MOST_MULTIPROCESSORS)):
            tiling = tile(1, kv_heads, group * rows, capacity, multiprocessors)
            found.add(Tile(tiling.block_m, tiling.splits > 1))
    return [one for one in TILES if one in found]


def statistics_count(batch: int, kv_heads: int, packed_rows: int, splits: int) -> int:
    """Return how many maxima, and sums, the parts of a cache have, rounded up so that what follows is aligned."""
    return _ceil(batch * kv_heads * splits * packed_rows, ALIGNMENT) * ALIGNMENT


def workspace_bytes(batch: int, kv_heads: int, packed_rows: int, head_dim: int, splits: int) -> int:
    """Return the bytes of the partial outputs, maxima and sums; none where the cache is not split."""
    if splits == 1:
        return 0
    return 4 * statistics_count(batch, kv_heads, packed_rows, splits) * (head_dim + 2)


def workspace_limit(batch: int, kv_heads: int, packed_rows: int, head_dim: int) -> int:
    """Return what no call with shapes up to these needs more than, on any GPU.

    Smaller shapes may be split into more parts, and need more, than the largest ones.
    """
    rows = batch * kv_heads * MAX_SPLITS * packed_rows
    # A split adds fewer programs than there were to be at all, and a program has at most the largest block of rows.
    rows = min(rows, 2 * PROGRAMS_PER_MULTIPROCESSOR * MOST_MULTIPROCESSORS * BLOCK_M[-1])
    return 4 * (rows + ALIGNMENT) * (head_dim + 2)


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
