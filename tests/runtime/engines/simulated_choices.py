"""The kernels of choices on the simulated GPU: their definition, executed on what lies at the given addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugins import choose_reference as reference
from plugins.choosing import HEADER, JOB, TOP, tile

Memory = Callable[[int, int], NDArray[np.uint8]]
KERNELS = (b"peak_kernel", b"weigh_kernel", b"collect_kernel")


def execute(kernel: bytes, at: Memory, grid: Sequence[int], arguments: Sequence[Any]) -> None:
    """Execute a launch; `at` gives so many bytes at an address."""
    splits, count, one = grid
    jobs = at(arguments[0], count * JOB.itemsize).view(JOB)
    vocab = arguments[3 if kernel == b"weigh_kernel" else 4 if kernel == b"peak_kernel" else 5]
    tiling = tile(vocab)
    assert (splits, one) == (tiling.splits, 1)

    def table(address: int, index: int, width: int, dtype: type) -> NDArray[Any]:
        return at(address + 4 * index * width, 4 * width).view(dtype)

    for index, job in enumerate(jobs):
        logits = reference.tempered(at(int(job["row"]), 4 * vocab).view(np.float32).copy(), job["temperature"])
        room = int(job["room"])
        if kernel == b"peak_kernel":
            _, results, tops, peaks = arguments[:4]
            own_tops, own_peaks = reference.peaks(logits, tiling)
            table(tops, index, splits, np.int32)[:] = own_tops
            table(peaks, index, tiling.groups, np.int32)[:] = own_peaks
            at(results + 4 * int(job["out"]), 4).view(np.int32)[0] = 0
        elif kernel == b"weigh_kernel":
            _, tops, sums = arguments[:3]
            top = reference.as_floats(table(tops, index, splits, np.int32).max(keepdims=True))[0]
            if job["kind"] != TOP:
                table(sums, index, splits, np.float32)[:] = reference.weigh(logits, top, job, tiling)
        else:
            _, results, tops, peaks, sums = arguments[:5]
            assert arguments[6] == tiling.groups
            found = reference.collect(
                logits,
                table(tops, index, splits, np.int32),
                table(peaks, index, tiling.groups, np.int32),
                table(sums, index, splits, np.float32),
                job,
            )
            out = at(results + 4 * int(job["out"]), 4 * (HEADER + 2 * room)).view(np.int32)
            assert out[0] == 0, "the count of an answer begins at none"
            out[0] = len(found.tokens)
            out[1:3] = np.array([found.top, found.total], dtype=np.float32).view(np.int32)
            # In an order of no meaning, as programs finish.
            held = found.tokens[::-1][:room]
            out[HEADER : HEADER + len(held)] = held
            out[HEADER + room : HEADER + room + len(held)] = logits[held].view(np.int32)
