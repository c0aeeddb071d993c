"""The kernels of choices under Triton's interpreter, against their definition and the host's own noise.

Run by `test_choose_kernel`, which sets TRITON_INTERPRET.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from plugins import choose_reference as reference
from plugins.binaries import COLLECT, PEAK, WEIGH
from plugins.choose_kernel import collect_kernel, peak_kernel, weigh_kernel
from plugins.choose_launch import ChooseBuffers, choose_launches
from plugins.choosing import JOB, RACE, SCORE_MARGIN, SUM_MARGIN, Tiling, tile
from plugins.compile import choosing_constants
from plugins.launch import POINTER
from runtime.sampling.noise import Noise
from tests.plugins.jobs import MASK, answer, key_for, random_jobs, random_logits, results_for

KERNELS = {PEAK: peak_kernel, WEIGH: weigh_kernel, COLLECT: collect_kernel}
warnings.simplefilter("ignore", RuntimeWarning)


def run(
    rows: NDArray[np.float32], jobs: NDArray[np.void], results: NDArray[np.int32], tiling: Tiling
) -> NDArray[np.float32]:
    """Do in the interpreter what the launcher does on a GPU; return what the second kernel found of each block."""
    count, vocab = rows.shape
    for job, row in zip(jobs, rows, strict=True):
        job["row"] = row.ctypes.data
    scratch = {
        "tops": torch.full((count, tiling.splits), 77, dtype=torch.int32),
        "sums": torch.full((count, tiling.splits), float("nan")),
        "peaks": torch.full((count, tiling.groups), 77, dtype=torch.int32),
        "jobs": torch.from_numpy(jobs.view(np.int64)),
        "results": torch.from_numpy(results),
    }
    for launch in choose_launches(ChooseBuffers(0, 0, 0), count, vocab, tiling):
        kernel = KERNELS[launch.variant]
        numbers = [value for value, kind in launch.arguments[:-2] if kind is not POINTER]
        pointers = [scratch[name] for name in kernel.arg_names if name in scratch]
        assert len(pointers) + len(numbers) == len(launch.arguments) - 2
        kernel[launch.grid](*pointers, *numbers, **choosing_constants(kernel.arg_names, vocab, tiling.block))
    return scratch["sums"].numpy()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3000), st.integers(1, 4), st.sampled_from([64, 512, 2048]), st.booleans(), st.integers(0, 2**31))
def test_the_kernels_compute_their_definition(vocab: int, count: int, block: int, odd: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tiling = tile(vocab, block)
    rows = np.stack([random_logits(rng, vocab, odd) for _ in range(count)])
    jobs = random_jobs(rng, count)
    results = results_for(jobs)
    run(rows, jobs, results, tiling)
    for job, row in zip(jobs, rows, strict=True):
        logits = reference.tempered(row, job["temperature"])
        tops, groups = reference.peaks(logits, tiling)
        largest = reference.as_floats(np.array([tops.max()]))[0]
        expected = reference.collect(logits, tops, groups, reference.weigh(logits, largest, job, tiling), job)
        found, top, total, held = answer(job, results)
        np.testing.assert_array_equal(top, expected.top)
        np.testing.assert_array_equal(top, logits.max())
        if not np.isfinite(top):
            continue
        for token, logit in held.items():
            assert logit == logits[token]
        if job["kind"] == RACE:
            # Tokens that are just at the bound may be on either side of it.
            scores = reference.scores(logits, top, int(job["key"]), job["least"])
            assert abs(total - scores.max()) < SCORE_MARGIN / 4
            surely, perhaps = (
                set(np.flatnonzero(scores >= scores.max() - 2 * SCORE_MARGIN + shift).tolist())
                for shift in (SCORE_MARGIN / 2, -SCORE_MARGIN / 2)
            )
            assert len(surely) <= found <= len(perhaps)
            if found <= job["room"]:
                assert surely <= set(held) <= perhaps
            continue
        assert abs(total - expected.total) <= SUM_MARGIN / 4 * expected.total
        assert found == len(expected.tokens)
        if found <= job["room"]:
            assert sorted(held) == expected.tokens.tolist()
        else:
            assert set(held) < set(expected.tokens.tolist())


HALF, ALL = 1 << 52, 1 << 53
# Around 1/2, where the arithmetic changes and the host's own begins to round; nearly 0, and nearly 1.
NUMBERS = st.one_of(
    st.integers(0, ALL - 1),
    st.integers(HALF - 3, HALF + 3),
    st.integers(0, 53).map(lambda bits: (1 << bits) - 1),
    st.integers(0, 52).map(lambda bits: ALL - (1 << bits)),
)


@settings(deadline=None, max_examples=40)
@given(NUMBERS, st.integers(0, 11), st.sampled_from([0.01, 0.7, 1.0, 2.3]), st.floats(0.0, 30.0), st.integers(0, 2**31))
def test_a_score_is_the_hosts_own_within_the_margin(
    number: int, token: int, temperature: float, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(12) * scale).astype(np.float32)
    jobs = np.zeros(1, dtype=JOB)
    jobs["kind"], jobs["room"], jobs["temperature"], jobs["least"] = RACE, 8, temperature, -np.inf
    jobs["key"] = key_for(token, number)
    # Blocks of one token each tell every score.
    found = run(logits[None], jobs, results_for(jobs), tile(12, 1))[0]

    class Known(Noise):
        def key(self, position: int) -> np.uint64:
            return jobs["key"][0]

    tempered = logits / np.float32(temperature)
    below = tempered - tempered.max()
    waits = Known(0, 0).waits(0, np.arange(12))
    if number == ALL - 1:
        # The host's number is 1, and no bound holds.
        assert waits[token] == 0
        assert found[token] == np.inf
    bounded = (below > -80) & (waits > 0)
    expected = np.log(np.exp(below).astype(np.float64)) - np.log(np.where(waits > 0, waits, 1.0))
    assert np.abs(found - expected)[bounded].max(initial=0) < SCORE_MARGIN / 4
    # What has next to no weight cannot come near the top token.
    assert (found[~bounded & (waits > 0)] < -35).all()


def test_keys_can_be_had_for_any_number() -> None:
    for token, number in ((0, 0), (7, 12345), (131071, ALL - 1)):
        assert 0 <= key_for(token, number) <= MASK
        logits = np.zeros(token + 1, dtype=np.float32)
        score = reference.scores(logits, np.float32(0), key_for(token, number), np.float32(-np.inf))[token]
        uniform = (np.float64(number) + 0.5) * 2.0**-53
        with np.errstate(divide="ignore"):
            assert score == -np.log(-np.log(uniform))
