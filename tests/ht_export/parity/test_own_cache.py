"""Engines whose cache is their own, as TensorRT's: what they compute, compared without keys and values."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ht_export.model.checkpoint import load_base_model
from ht_export.model.reference import HiddenTransferModel
from ht_export.model.transfer import load_transfer_layers
from ht_export.parity.run import _in_its_own_cache
from ht_export.verify.passes import Expected, record
from ht_export.verify.traces import ReferenceTracer, Trace
from runtime import Generator
from runtime.engines.places import PlacedSlot


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, tiny_transfer: Path) -> list[tuple[Expected, Trace]]:
    base = load_base_model(str(tiny_checkpoint))
    transfer, _ = load_transfer_layers(tiny_transfer, base.identity())
    reference = ReferenceTracer(HiddenTransferModel(base.model, transfer).eval())
    return [(one, reference.run(one.rows, one.cache)) for one in record(reference.engine)]


def test_every_case_is_compared(tiny_engine: Path, expected: list[tuple[Expected, Trace]]) -> None:
    generator = Generator(tiny_engine, threads=1, adapt=False)
    assert isinstance(generator.engine.new_slot(), PlacedSlot)
    found = list(_in_its_own_cache(generator, expected))
    assert {one.case for one in found} == {one.case for one, _ in expected}
    assert max(one.relative for one in found) < 1e-4


def test_another_cache_is_noticed(tiny_engine: Path, expected: list[tuple[Expected, Trace]]) -> None:
    """Passes build on each other: what an earlier one left is seen by the later ones."""
    generator = Generator(tiny_engine, threads=1, adapt=False)
    first, trace = expected[0]
    rows = replace(first.rows, input_ids=np.roll(first.rows.input_ids, 1))
    changed = replace(first, rows=rows)
    found = list(_in_its_own_cache(generator, [(changed, trace), *expected[1:]]))
    assert all(max(one.relative for one in found if one.case == case.case) > 1e-3 for case, _ in expected)
