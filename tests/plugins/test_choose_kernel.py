"""The kernels of choices: compiled, split among programs, and launched with what they take."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from plugins.binaries import CHOOSE, COMMIT_ARCHITECTURES  # noqa: E402
from plugins.choose_launch import ChooseBuffers, choose_launches, scratch_bytes  # noqa: E402
from plugins.choose_reference import numbered, peaks  # noqa: E402
from plugins.choosing import LEAST_GROUPS, MOST_BEST, MOST_GROUPS, best_room, tile  # noqa: E402
from plugins.compile import compile_choosing, spilled_bytes  # noqa: E402
from runtime.bindings import MOST_VOCABULARY  # noqa: E402
from tests.plugins.test_kernel import parameters  # noqa: E402

HERE = Path(__file__).parent


def test_the_kernels_compute_their_definition_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_choices.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "3 passed" in done.stdout


@pytest.mark.parametrize("sm", COMMIT_ARCHITECTURES)
def test_every_architecture_has_them_without_spills_and_takes_what_is_passed(sm: int) -> None:
    sizes = {"c_void_p": 8, "c_int": 4}
    kernels = compile_choosing(128256, [sm])[sm]
    launches = choose_launches(ChooseBuffers(256, 512, 1024), 5, 128256)
    assert [launch.variant for launch in launches] == list(kernels) == list(CHOOSE)
    for launch, kernel in zip(launches, kernels.values(), strict=True):
        assert not spilled_bytes(kernel.cubin)
        assert kernel.shared_memory <= 48 * 1024
        assert [sizes[kind.__name__] for _, kind in launch.arguments] == parameters(kernel)


@settings(max_examples=200)
@given(st.integers(1, MOST_VOCABULARY))
def test_rows_of_any_size_are_split_into_few_groups_and_enough(vocab: int) -> None:
    tiling = tile(vocab)
    assert tiling.splits * tiling.block >= vocab > (tiling.splits - 1) * tiling.block
    assert tiling.block % tiling.group == 0
    assert tiling.groups <= MOST_GROUPS
    assert vocab < LEAST_GROUPS or vocab // tiling.group >= LEAST_GROUPS


def test_memory_between_launches_holds_all_of_it_one_behind_the_other() -> None:
    jobs, vocab = 7, 128256
    tiling = tile(vocab)
    peak, weigh, collect = choose_launches(ChooseBuffers(1 << 20, 2 << 20, 3 << 20), jobs, vocab)
    tops, groups = (value for value, _ in peak.arguments[2:4])
    sums = weigh.arguments[2][0]
    assert tops % 256 == sums % 256 == groups % 256 == 0
    assert 3 << 20 == tops <= sums - 4 * jobs * tiling.splits
    assert sums <= groups - 4 * jobs * tiling.splits
    assert groups + 4 * jobs * tiling.groups <= (3 << 20) + scratch_bytes(jobs, vocab)
    assert [value for value, _ in collect.arguments[:5]] == [1 << 20, 2 << 20, tops, groups, sums]


@pytest.mark.parametrize("vocab", [32000, 49152, 128256, 262144])
@pytest.mark.parametrize("neighbours", [0, 500, 5000])
def test_there_is_room_for_the_best_wherever_they_are(vocab: int, neighbours: int) -> None:
    rng = np.random.default_rng(vocab)
    for _ in range(5):
        logits = rng.standard_normal(vocab).astype(np.float32)
        # As frequent tokens are in most vocabularies.
        logits[100 : 100 + neighbours] += 8
        falling = np.sort(peaks(logits, tile(vocab))[1])[::-1]
        for count in (16, 64, MOST_BEST):
            assert count <= (numbered(logits) >= falling[count - 1]).sum() <= best_room(count)
