from dataclasses import replace

import pytest

from ht_export.tensorrt.limits import cache_bytes, check_limits, profiles, typical_batch
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import Limits
from runtime.errors import InputError
from runtime.tree import TreeSizes

DIMS = GraphDims(4, 9, 3, 64, 576, 1000, (2, 2), "float16")
LIMITS = Limits(max_batch=2, max_context=2048, max_rows=32, chunk=256)
TREE = TreeSizes(16, (16, 8))


def test_profiles_span_the_limits_and_are_tuned_for_the_tree() -> None:
    verification, prompt = profiles(DIMS, LIMITS, TREE)
    assert verification.shapes.keys() == prompt.shapes.keys() == {binding.name for binding in DIMS.inputs()}
    assert verification.shapes["input_ids"] == ((1, 1), (1, 16), (2, 32))
    assert verification.shapes["tree_mask"] == ((1, 1, 1), (1, 40, 40), (2, 96, 96))
    assert verification.shapes["pseudo_parent_2"] == ((1, 0), (1, 8), (2, 32))
    assert verification.shapes["logit_rows"] == ((1, 1), (1, 16), (2, 32))
    assert verification.shapes["key_cache_3"] == ((1, 3, 0, 64), (1, 3, 512, 64), (2, 3, 2112, 64))
    assert prompt.shapes["input_ids"] == ((1, 1), (1, 256), (2, 256))
    assert prompt.shapes["position_ids"] == ((1, 1), (1, 258), (2, 258))
    assert prompt.shapes["logit_rows"] == ((1, 1), (1, 1), (2, 1))


def test_verification_is_tuned_for_half_of_the_requests_that_there_may_be() -> None:
    assert [typical_batch(most) for most in (1, 2, 3, 4, 6, 8, 12, 16, 1024)] == [1, 1, 2, 2, 4, 4, 8, 8, 512]
    verification, prompt = profiles(DIMS, replace(LIMITS, max_batch=8), TREE)
    assert verification.shapes["input_ids"] == ((1, 1), (4, 16), (8, 32))
    assert verification.shapes["key_cache_0"] == ((1, 3, 0, 64), (4, 3, 512, 64), (8, 3, 2112, 64))
    assert prompt.shapes["input_ids"] == ((1, 1), (1, 256), (8, 256))


def test_every_shape_of_a_profile_grows_from_least_to_most() -> None:
    small = Limits(max_batch=1, max_context=8, max_rows=4, chunk=8)
    for limits, tree in ((LIMITS, TREE), (small, TreeSizes(2, (2, 1)))):
        for profile in profiles(DIMS, limits, tree):
            for name, (least, typical, most) in profile.shapes.items():
                assert all(a <= b <= c for a, b, c in zip(least, typical, most, strict=True)), (profile.name, name)


def test_the_cache_at_the_limits() -> None:
    assert cache_bytes(DIMS, LIMITS) == 2 * 2112 * (2 * 4 * 3 * 64 * 2)
    assert cache_bytes(replace(DIMS, dtype="float32"), LIMITS) == 2 * cache_bytes(DIMS, LIMITS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch": 0}, "--max-batch must be at least 1, not 0"),
        ({"chunk": -1}, "--chunk must be at least 1, not -1"),
        ({"chunk": 10**9}, "--chunk must be at most 16384"),
        ({"max_rows": 10**9}, "--max-rows must be at most 10922"),
        ({"max_batch": 10**9}, "--max-batch must be at most 1024"),
        ({"max_context": 9000}, "--max-context 9000: the model's own context is 8192 tokens"),
        ({"max_rows": 8}, "--max-rows 8 is less than the default tree's 16 rows"),
        ({"max_context": 8}, "--max-context 8 is less than the default tree's 16 rows"),
        ({"max_context": 100}, "--chunk 256 is more than --max-context 100"),
    ],
)
def test_limits_that_contradict_each_other(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_limits(replace(LIMITS, **changes), TREE, 8192)
