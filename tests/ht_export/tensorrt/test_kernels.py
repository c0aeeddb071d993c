"""The kernels that a plan carries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ht_export.tensorrt import kernels
from ht_export.tensorrt.kernels import Wanted, kernel_workers
from ht_export.tensorrt.limits import profiles
from plugins.binaries import CHOOSE, CHOOSE_DRAFTS, COMBINE, COMMIT, Form, Variant
from plugins.specialisations import Specialisation
from plugins.tiling import TILES
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import Limits
from runtime.errors import InputError
from runtime.tree import TreeSizes

DIMS = GraphDims(2, 4, 2, 64, 256, 100, (1,), "float16")
LIMITS = Limits(max_batch=8, max_context=4096, max_rows=8, chunk=16)
FORMS = (Form(), Form(windowed=True))


def wanted(dims: GraphDims = DIMS, limits: Limits = LIMITS, forms: tuple[Form, ...] = FORMS) -> Wanted:
    return Wanted.of(dims, profiles(dims, limits, TreeSizes(4, (4,))), forms, ((80,), (75, 80)))


def test_a_plan_has_the_attention_of_its_graph_and_what_the_runtime_launches() -> None:
    found = wanted()
    attention = {Variant(tile.block_m, tile.split, form) for form in FORMS for tile in TILES}
    assert {(one.sm, one.variant) for one in found.attention} == {(80, one) for one in {*attention, COMBINE}}
    assert {(one.sm, one.variant) for one in found.runtime} == {
        (sm, one) for sm in (75, 80) for one in (COMMIT, *CHOOSE)
    }
    drafts = [one for one in wanted(replace(DIMS, draft_size=50)).runtime if one.variant in CHOOSE_DRAFTS]
    assert [one.vocab_size for one in drafts] == [50] * 6


def test_a_plan_of_short_contexts_never_splits_its_cache() -> None:
    assert len(wanted(limits=replace(LIMITS, max_context=500)).attention) == 2 * 6 + 1
    assert len(wanted(limits=replace(LIMITS, max_context=400)).attention) == 2 * 3
    assert wanted(forms=()).attention == []


def test_a_kernel_that_cannot_be_compiled_is_an_error_for_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    odd = Wanted(DIMS, [], [Specialisation(COMMIT, 999, "float16", 64)])
    named = r"^compiling kernels: the copy of accepted rows, head size 64, SM 99\.9: .*; free some memory, or install"
    with pytest.raises(InputError, match=named):
        odd.compile(lambda *_: None)


@pytest.mark.parametrize(
    ("cores", "free", "expected"), [(2, 1 << 40, 2), (64, 1 << 40, 16), (64, 1 << 30, 2), (4, 0, 1)]
)
def test_as_many_processes_compile_as_there_are_cores_and_memory_for(
    cores: int, free: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "cores", lambda: cores)
    monkeypatch.setattr(kernels, "available_bytes", lambda: free)
    assert kernel_workers() == expected
