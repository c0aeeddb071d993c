"""What is compiled is what can be launched."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.binaries import COMBINE, Form
from plugins.launch import Buffers, Scores, Shapes, launches
from plugins.specialisations import of_attention
from plugins.tiling import TILES, Tile, reachable_tiles

FORMS = [Form(windowed, capped) for windowed in (False, True) for capped in (False, True)]


@settings(max_examples=150)
@given(
    st.integers(1, 72),
    st.sampled_from([1, 2, 3, 8, 32, 500]),
    st.integers(1, 300),
    st.sampled_from([0, 255, 511, 512, 4352, 1 << 17]),
    st.sampled_from(FORMS),
    st.randoms(use_true_random=False),
)
def test_every_launch_within_a_plans_limits_is_of_a_kernel_that_was_compiled(
    group: int, kv_heads: int, most_rows: int, most_capacity: int, form: Form, random: Random
) -> None:
    tiles = reachable_tiles(group, kv_heads, most_rows, most_capacity)
    compiled = {one.variant for one in of_attention("float16", 64, [80], [form], tiles)}
    buffers = Buffers(0, 1, 2, 3, 4, 5, 6, 7, 8 if form.windowed else 0)
    scores = Scores(1.0, 30.0 if form.capped else 0.0)
    for _ in range(20):
        batch, rows, capacity = random.randint(1, 64), random.randint(1, most_rows), random.randint(0, most_capacity)
        shapes = Shapes(batch, group * kv_heads, kv_heads, rows, capacity, 64)
        launched = launches(shapes, buffers, 1 << 20, scores, random.randint(1, 300))
        assert {launch.variant for launch in launched} <= compiled


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        # SmolLM2-135M and Gemma 3 270M, with 4,096 tokens of context and chunks of 256.
        ((3, 3, 259, 4128), list(TILES)),
        ((4, 1, 259, 4128), list(TILES)),
        # A cache of less than two parts of 256 rows is never split.
        ((3, 3, 259, 511), [Tile(16, False), Tile(32, False), Tile(64, False)]),
        # Of 40 heads that share keys and values a single row has more packed rows than small tiles.
        ((40, 1, 259, 511), [Tile(64, False)]),
        ((20, 1, 1, 511), [Tile(32, False)]),
        # So many heads fill every GPU.
        ((1, 500, 16, 1 << 17), [Tile(16, False)]),
    ],
)
def test_what_no_call_can_ask_for_is_not_compiled(limits: tuple[int, int, int, int], expected: list[Tile]) -> None:
    assert reachable_tiles(*limits) == expected


def test_parts_are_joined_where_there_are_any() -> None:
    whole = of_attention("float16", 64, [80, 90], tiles=[Tile(16, False)])
    assert [(one.sm, one.variant.block_m, one.variant.split) for one in whole] == [(80, 16, False), (90, 16, False)]
    parts = of_attention("float16", 64, [80], tiles=[Tile(16, True)])
    assert [one.variant.split for one in parts] == [True, True]
    assert parts[1].variant == COMBINE
