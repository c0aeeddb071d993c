"""Choices on the device as Triton kernels; what they compute is defined by `plugins.choose_reference`.

Three launches answer all jobs (`plugins.choosing`) of a pass, each with one program for every block of every row:
`peak_kernel` finds the largest logit of each group, `weigh_kernel` the largest score, or the sum of exponentials, of
each block, `collect_kernel` what is above a bound that follows from those.

Logits are compared as integers of the same order, so that what is not a number counts as the largest, as in numpy.

**Scores.** The host (`runtime.sampling.noise`) draws the token with the least wait -log(u) / w, where w is its weight
exp(d) for d = x - top as a float32, and u its number. The kernel's score d - log(-log(u)) estimates s, the logarithm of
1 / wait. d and u are the host's to the bit: division and subtraction are IEEE's, u is integers. What is not exact:

- log(w) is d within 5e-7: numpy's exp of float32 is good to 4 units in the last place, at most 2^-23 of the value each.
  Below d = -87, where w has fewer bits, a token can't win: the top token's s is -log(-log(u)) >= -log(54 log 2) > -3.7,
  and -87 - log(2^-53) is less than -50. (Only u = 1 could, whose wait is 0; see below.)
- -log(u) for u <= 1/2: u is rounded to float32 (6e-8), its logarithm, at least 0.69 in size, is good to 2^-22 by the
  least exact instruction that there is: together 5e-7 of the value.
- -log(u) for u > 1/2, by y = 1 - u: as 2 artanh(z), z = y / (2 - y) <= 1/3, whose series up to z^11 leaves out less
  than (1/9)^6 / 13 * 9/8 < 2e-7 of the value. y is rounded (2^-24, times 4/3), so are 2 - y, the quotient (2 units),
  z^2 and five steps of the polynomial: less than 16 * 2^-24 < 1e-6.
- The logarithm of that, from -36.8 to 3.7: 2^-22 of it, or 2^-22 near 0: less than 9e-6.
- The difference: scores above -4 are less than 64, so half a unit is less than 4e-6.

Together less than 2e-5; SCORE_MARGIN is 1e-4. A score is SCORE_MARGIN from s at most, so the host's winner h, with m
the token of the largest score, has score(h) >= s(h) - margin >= s(m) - margin >= score(m) - 2 margin: all that can win
is collected. That holds where the two kernels that compute it round differently, too. And the host, which finds the
winner among what is collected, knows that no other token has s above score(m) - margin: where the winner has less, as
the best one took no part after all, or where u is 1 and the score infinite, it takes the row whole.

**Sums** of exp(d) are off by 2^-24 * 128 (the product with log2(e), d > -104) + 2 * 2^-22 (the instruction) for each
term, and by 2^-24 for each of at most 16 + 7 (a block) and 1024 (blocks, one after the other at worst) additions:
7.7e-6 + 5e-7 + 6.3e-5. SUM_MARGIN is 1e-4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plugins import choosing

WORDS = tl.constexpr(choosing.JOB.itemsize // 8)
TOP = tl.constexpr(choosing.TOP)
RACE = tl.constexpr(choosing.RACE)
BEST = tl.constexpr(choosing.BEST)
HEADER = tl.constexpr(choosing.HEADER)
MARGIN = tl.constexpr(choosing.SCORE_MARGIN)
# Less than the number of any logit, and that of NaN.
NOTHING = tl.constexpr(-(2**31))
NOT_A_NUMBER = tl.constexpr(2**31 - 1)
LANES = tl.constexpr(choosing.LANES)
# SplitMix64, as in `runtime.sampling.noise`.
GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
FIRST, SECOND = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)
UNIT = tl.constexpr(2.0**-54)


@triton.jit
def _numbered(x):
    """Return integers in the order of the floats x, NaN the largest."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, NOT_A_NUMBER, bits ^ ((bits >> 31) & NOT_A_NUMBER))


@triton.jit
def _float(number):
    """Return the float of an integer of `_numbered`."""
    return (number ^ ((number >> 31) & NOT_A_NUMBER)).to(tl.float32, bitcast=True)


@triton.jit
def _tokens(BLOCK: tl.constexpr):
    """Return the tokens of a program: see `plugins.choosing.Tiling`."""
    lanes: tl.constexpr = LANES if BLOCK > LANES else BLOCK
    index = tl.arange(0, BLOCK)
    return (index // lanes * tl.num_programs(0) + tl.program_id(0)) * lanes + index % lanes


@triton.jit
def _setting(job, word: tl.constexpr):
    """Return a float of a job."""
    return tl.load(job + word).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _tempered(job, tokens, vocab):
    """Return the logits of `tokens`, divided by the temperature."""
    row = tl.load(job).to(tl.pointer_type(tl.float32))
    return tl.div_rn(tl.load(row + tokens, mask=tokens < vocab, other=-float("inf")), _setting(job, 6))


@triton.jit
def _largest(tops, splits, SPLITS: tl.constexpr):
    """Return the largest logit of a row, as a number."""
    split = tl.arange(0, SPLITS)
    return tl.max(tl.load(tops + split, mask=split < splits, other=NOTHING), 0)


@triton.jit
def _scores(job, below, tokens, vocab):
    """Return the scores of tokens whose logits are `below` the largest; -inf for those that take no part."""
    words = (tokens + 1).to(tl.uint64) * GAMMA + tl.load(job + 1).to(tl.uint64)
    words = (words ^ (words >> 30)) * FIRST
    words = (words ^ (words >> 27)) * SECOND
    words = ((words ^ (words >> 31)) >> 11).to(tl.int64)
    # The host adds a half, which large floats round to even: u in units of 2^-54.
    units = tl.where(words < 4503599627370496, 2 * words + 1, 2 * (words + (words & 1)))
    rest = (18014398509481984 - units).to(tl.float32) * UNIT
    z = rest / (2.0 - rest)
    q = z * z
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11)))))
    waits = tl.where(units > 9007199254740992, 2.0 * z * series, -tl.log(units.to(tl.float32) * UNIT))
    takes_part = (tokens < vocab) & (below > -float("inf")) & (below >= _setting(job, 7))
    return tl.where(takes_part, below - tl.log(waits), -float("inf"))


@triton.jit
def peak_kernel(
    jobs,  # int64 [N, WORDS]
    results,  # int32: counts of answers become 0
    tops,  # int32 [N, splits]: the largest number of each block
    peaks,  # int32 [N, groups]: of each group
    vocab,  # V
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid: (splits, N)."""
    split = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    job = jobs + index * WORDS
    tokens = _tokens(BLOCK)
    numbers = tl.where(tokens < vocab, _numbered(_tempered(job, tokens, vocab)), NOTHING)
    in_block: tl.constexpr = BLOCK // GROUP
    groups = tl.max(tl.reshape(numbers, [GROUP, in_block]), 0)
    splits = tl.num_programs(0)
    tl.store(peaks + (index * splits + split) * in_block + tl.arange(0, in_block), groups)
    tl.store(tops + index * splits + split, tl.max(numbers, 0))
    if split == 0:
        tl.store(results + tl.load(job + 4), 0)


@triton.jit
def weigh_kernel(
    jobs,  # int64 [N, WORDS]
    tops,  # int32 [N, splits]
    sums,  # float32 [N, splits]: of each block the largest score, or the sum of exponentials
    vocab,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid: (splits, N)."""
    split = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    job = jobs + index * WORDS
    kind = tl.load(job + 2)
    splits = tl.num_programs(0)
    if kind != TOP:
        top = _float(_largest(tops + index * splits, splits, SPLITS))
        tokens = _tokens(BLOCK)
        below = _tempered(job, tokens, vocab) - top
        if kind == RACE:
            tl.store(sums + index * splits + split, tl.max(_scores(job, below, tokens, vocab), 0))
        else:
            weights = tl.where(tokens < vocab, tl.exp(below), 0.0)
            tl.store(sums + index * splits + split, tl.sum(weights, 0))


@triton.jit
def _bound(peaks, count, groups, GROUPS: tl.constexpr):
    """Return the `count`-th largest of the largest of groups: at least `count` tokens reach it, and few more."""
    group = tl.arange(0, GROUPS)
    numbers = tl.load(peaks + group, mask=group < groups, other=NOTHING)
    reach = tl.sum((numbers >= 0).to(tl.int32), 0)
    bound = tl.where(reach >= count, 0, NOTHING)
    step = 1 << 30
    for _ in range(31):
        reach = tl.sum((numbers >= bound + step).to(tl.int32), 0)
        bound = tl.where(reach >= count, bound + step, bound)
        step = step >> 1
    return bound


@triton.jit
def collect_kernel(
    jobs,  # int64 [N, WORDS]
    results,  # int32, see `plugins.choosing.HEADER`
    tops,  # int32 [N, splits]
    peaks,  # int32 [N, groups]
    sums,  # float32 [N, splits]
    vocab,
    groups,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Grid: (splits, N)."""
    split = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    job = jobs + index * WORDS
    kind = tl.load(job + 2)
    out = results + tl.load(job + 4)
    room = tl.load(job + 5).to(tl.int32)
    splits = tl.num_programs(0)
    largest = _largest(tops + index * splits, splits, SPLITS)
    top = _float(largest)
    tokens = _tokens(BLOCK)
    logits = _tempered(job, tokens, vocab)
    total = tl.full([], 0.0, tl.float32)
    if kind == RACE:
        part = tl.arange(0, SPLITS)
        total = tl.max(tl.load(sums + index * splits + part, mask=part < splits, other=-float("inf")), 0)
        wanted = _scores(job, logits - top, tokens, vocab) >= total - 2 * MARGIN
    else:
        bound = largest
        if kind == BEST:
            part = tl.arange(0, SPLITS)
            total = tl.sum(tl.load(sums + index * splits + part, mask=part < splits, other=0.0), 0)
            bound = _bound(peaks + index * groups, tl.load(job + 3).to(tl.int32), groups, GROUPS)
        wanted = _numbered(logits) >= bound
    wanted = wanted & (tokens < vocab)
    count = tl.sum(wanted.to(tl.int32), 0)
    if count > 0:
        place = tl.atomic_add(out, count) + tl.cumsum(wanted.to(tl.int32), 0) - 1
        fits = wanted & (place < room)
        tl.store(out + HEADER + place, tokens, mask=fits)
        tl.store(out + HEADER + room + place, logits.to(tl.int32, bitcast=True), mask=fits)
    if split == 0:
        tl.store(out + 1, top.to(tl.int32, bitcast=True))
        tl.store(out + 2, total.to(tl.int32, bitcast=True))
