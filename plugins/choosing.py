"""Choices on the device: what is asked of each row of logits, and where the answer is found.

A row is never sorted and never leaves the device. For each there is a *job*: collect the few tokens that an exact
choice can depend on, with their logits, in an order of no meaning. Which these are is stated in
`plugins.choose_reference`; the choice itself is made of them by the host, in its own arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# What to collect. All logits are divided by the job's temperature first.
# TOP: the largest, and all that equal it.
# RACE: those that may be the first of the race; `key` is the position's key of the noise, and tokens whose logit is
#   more than -`least` below the largest one take no part.
# BEST: the `count` largest and all that equal the last of them, and perhaps more.
TOP, RACE, BEST = 1, 2, 3

# One job as it lies in device memory: words of 8 bytes. `row` is the address of the logits float32 [V]; the answer is
# from word `out` on of the results, which has room for `room` tokens.
JOB = np.dtype(
    {
        "names": ["row", "key", "kind", "count", "out", "room", "temperature", "least"],
        "formats": ["<i8", "<u8", "<i8", "<i8", "<i8", "<i8", "<f4", "<f4"],
        "offsets": [0, 8, 16, 24, 32, 40, 48, 56],
        "itemsize": 64,
    }
)
# Words of 4 bytes before an answer's tokens [room] and their logits [room]: how many tokens there are, which may be
# more than there is room for; the largest logit; for RACE the largest score, for BEST the sum of exp(logit - largest).
HEADER = 4

# How far the kernel's score of a token may be from the logarithm of the host's own: see `plugins.choose_kernel`.
SCORE_MARGIN = 1e-4
# By what part a sum of exponentials may be off.
SUM_MARGIN = 1e-4
# The largest `count`. A bound found by the maxima of groups lets some more through.
MOST_BEST = 256
TOP_ROOM, RACE_ROOM = 8, 16


def best_room(count: int) -> int:
    """Return the room for the answer to a job for the `count` best."""
    return 2 * count + 16


def answer_words(room: int) -> int:
    """Return the words of 4 bytes that an answer takes."""
    return HEADER + 2 * room


@dataclass(frozen=True)
class Tiling:
    """A row of V logits is the work of `splits` programs, of `block` logits each; of every `group` of them the largest
    is kept. `groups` is their number, those behind the row's end included.

    Frequent tokens are neighbours in most vocabularies, and the best ones should be in many groups: programs take runs
    of LANES tokens in turn, and a group of its program's tokens one in every block / group.

    Kernels are compiled for it and travel with plans: where it changes they must become other variants, or those of
    older plans would be launched with numbers that are not theirs.
    """

    block: int
    group: int
    splits: int

    @property
    def groups(self) -> int:
        """The number of groups of a row."""
        return self.splits * (self.block // self.group)


# Logits of a program, the most of a group where that leaves few enough groups, and how many groups are enough: several
# times as many as there are tokens asked for, so that few groups have two of them.
BLOCK, GROUP, LEAST_GROUPS, MOST_GROUPS = 2048, 64, 512, 4096
# As many as are read at once.
LANES = 32


def tile(vocab_size: int, block: int = BLOCK) -> Tiling:
    """Return how rows of V = `vocab_size` logits are split."""
    group = 1
    while group < GROUP and vocab_size >= 2 * group * LEAST_GROUPS:
        group *= 2
    splits = -(-vocab_size // block)
    while group < block and splits * (block // group) > MOST_GROUPS:
        group *= 2
    return Tiling(block, group, splits)
