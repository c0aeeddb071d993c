"""The file of a token correction: what is whole is read, and anything else is one clear error."""

import io
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.drafting.correction import LARGEST_CORRECTION, CorrectedDrafts, TokenCorrection
from runtime.drafting.drafts import DraftStep
from runtime.errors import EngineFileError
from tests.runtime.drafting.test_drafts import VOCAB, random_correction


def test_tables_come_back_from_their_file(tmp_path: Path) -> None:
    correction = random_correction(0, 3)
    correction.write(tmp_path / "c.npy")
    found = TokenCorrection.read(tmp_path / "c.npy", VOCAB, 3)
    for step in range(3):
        expected = correction.after(correction.rows(step, np.arange(VOCAB)), 5)
        np.testing.assert_allclose(found.after(found.rows(step, np.arange(VOCAB)), 5), expected, atol=2e-2)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 1e4])
def test_corrections_have_a_bound_and_the_shortlist_of_a_step_is_looked_up_once(scale: float) -> None:
    correction = random_correction(4, 1, scale)
    tokens = np.array([3, 5, 9, 11])
    probabilities = np.array([0.4, 0.3, 0.1, 0.05])
    drafts = CorrectedDrafts([DraftStep(tokens, probabilities)], correction, 3)
    rows = correction.rows(0, tokens)
    for before in (7, 2, 7):
        added = np.clip(rows @ correction.contexts[before].astype(np.float32), -LARGEST_CORRECTION, LARGEST_CORRECTION)
        np.testing.assert_array_equal(correction.after(rows, before), added.astype(np.float64))
        weights = probabilities * np.exp(added.astype(np.float64))
        order = np.argsort(-weights, kind="stable")[:3]
        found = drafts.after(0, before)
        assert found.tokens.tolist() == tokens[order].tolist()
        rest = 1.0 - float(probabilities.sum())
        np.testing.assert_array_equal(found.probabilities, weights[order] / (float(weights.sum()) + rest))
    np.testing.assert_array_equal(probabilities, [0.4, 0.3, 0.1, 0.05])


@pytest.mark.parametrize(("vocab", "steps", "expected"), [(VOCAB, 2, 42), (VOCAB + 1, 3, 45), (VOCAB - 1, 3, 41)])
def test_tables_of_another_vocabulary_or_number_of_steps(tmp_path: Path, vocab: int, steps: int, expected: int) -> None:
    random_correction(0, 3).write(tmp_path / "c.npy")
    with pytest.raises(EngineFileError, match=f"it has 43 rows where {expected} are expected"):
        TokenCorrection.read(tmp_path / "c.npy", vocab, steps)


def saved(save: Callable[..., None], *arrays: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    save(file, *arrays, **options)
    return file.getvalue()


def described(rows: object, columns: object, descr: str = "'<f2'", order: str = "False", numbers: int = 129) -> bytes:
    """Return a file that says of itself that it has so many rows and columns."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': ({rows}, {columns}), }}".encode()
    text = text.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(2 * numbers)


TABLE = np.arange(43 * 3, dtype=np.float16).reshape(43, 3)
WHOLE = saved(np.save, TABLE)


@pytest.mark.parametrize(
    ("content", "cause"),
    {
        "junk": (b"junk", "does not begin"),
        "empty": (b"", "does not begin"),
        "npz": (saved(np.savez, TABLE), "does not begin"),
        "format 2.0": (WHOLE[:6] + b"\x02" + WHOLE[7:], "does not begin"),
        "float32": (saved(np.save, TABLE.astype(np.float32)), "does not begin"),
        "float64": (saved(np.save, TABLE.astype(np.float64)), "does not begin"),
        "whole numbers": (saved(np.save, TABLE.astype(np.int16)), "does not begin"),
        "complex numbers": (saved(np.save, TABLE.astype(np.complex64)), "does not begin"),
        "bytes the other way round": (saved(np.save, TABLE.astype(">f2")), "does not begin"),
        "objects": (saved(np.save, TABLE.astype(object), allow_pickle=True), "does not begin"),
        "fields": (saved(np.save, np.zeros((43, 3), dtype=[("a", "<f2")])), "does not begin"),
        "column by column": (saved(np.save, np.asfortranarray(TABLE)), "does not begin"),
        "one dimension": (saved(np.save, TABLE.ravel()), "does not begin"),
        "three dimensions": (saved(np.save, TABLE[None]), "does not begin"),
        "no columns": (saved(np.save, TABLE[:, :0]), "does not begin"),
        "negative rows": (described(-43, 3), "does not begin"),
        "negative columns": (described(43, -3), "does not begin"),
        "a shape of text": (described("'43'", 3), "does not begin"),
        "a shape to compute": (described(43, "3**9**9"), "does not begin"),
        "a deep shape": (described("(" * 5000, 3), "does not begin"),
        "many rows": (described(10**9, 3), "it has 1000000000 rows where 43"),
        "more rows than are counted": (described(10**30, 3), "does not begin"),
        "many columns": (described(43, 10**9), "not those of 43 x 1000000000 numbers"),
        "columns that overflow": (described(43, 2**32), "not those of 43 x 4294967296 numbers"),
        "the header's length": (WHOLE[:8] + b"\xff\xff" + WHOLE[10:], "does not begin"),
        "cut short": (WHOLE[:-1], "not those of 43 x 3 numbers"),
        "cut within the header": (WHOLE[:40], "does not begin"),
        "too long": (WHOLE + b"\0", "not those of 43 x 3 numbers"),
    }.values(),
)
def test_tables_that_do_not_fit(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "c.npy"
    path.write_bytes(content)
    with pytest.raises(EngineFileError, match=r"c\.npy is not a valid correction\.npy \(it .*; export") as raised:
        TokenCorrection.read(path, VOCAB, 3)
    assert cause in str(raised.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("row", "column", "place"),
    [(0, 0, "candidates hold {} in row 0"), (23, 1, "contexts hold {} in row 3"), (42, 2, "scales hold {} in row 2")],
)
def test_a_table_with_what_is_no_number_is_refused_by_name(
    tmp_path: Path, value: float, row: int, column: int, place: str
) -> None:
    table = TABLE.copy()
    table[row, column] = value
    np.save(tmp_path / "c.npy", table)
    with pytest.raises(EngineFileError, match=re.escape(f"({place.format(value)}); export the engine again")):
        TokenCorrection.read(tmp_path / "c.npy", VOCAB, 3)


def test_the_largest_numbers_there_are_make_finite_drafts(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.full((43, 3), np.finfo(np.float16).max))
    found = TokenCorrection.read(tmp_path / "c.npy", VOCAB, 3)
    assert np.isfinite(found.after(found.rows(0, np.arange(VOCAB)), 0)).all()


def test_tables_outlive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "c.npy"
    random_correction(0, 3).write(path)
    found = TokenCorrection.read(path, VOCAB, 3)
    before = found.candidates.copy()
    # Were they mapped, this would end the process.
    path.write_bytes(b"")
    np.testing.assert_array_equal(found.candidates, before)
