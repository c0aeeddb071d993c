"""Calibrated quantisation: what is stored is what was rounded, and real rows are multiplied more exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ht_export import cli
from ht_export.quantize import gptq
from ht_export.quantize.gptq import round_calibrated, second_moments
from ht_export.quantize.grid import Grid, packed_blocks
from ht_export.quantize.precision import STORED
from ht_export.quantize.weights import quantise
from ht_export.verify.passes import compare, record
from ht_export.verify.traces import tapped_session
from runtime import Generator
from runtime.bundle.engine_file import read_engine_file
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.ht_export.quantize.test_weights import dequantised

TEXTS = [list(range(3, 40)), list(range(200, 100, -3)), [7, 9, 11] * 9]


def correlated(count: int, size: int, seed: int) -> np.ndarray:
    """Return rows [count, size] in which few directions have nearly all the variance."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((max(2, size // 8), size))
    return (
        rng.standard_normal((count, len(directions))) @ directions + 0.05 * rng.standard_normal((count, size))
    ).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [64, 100, 300])
def test_what_is_stored_is_what_was_rounded_and_products_are_nearer(bits: int, size: int) -> None:
    weights = np.random.default_rng(size).standard_normal((24, size)).astype(np.float32)
    rows = correlated(400, size, 1)
    kept = weights.copy()
    rounded, ends = round_calibrated(weights, (rows.T @ rows).astype(np.float64), Grid(bits))
    np.testing.assert_array_equal(weights, kept)
    stored = dequantised(*packed_blocks(rounded, bits, ends), bits)[:, :size]
    np.testing.assert_allclose(stored, rounded, atol=1e-4)
    nearest = dequantised(*packed_blocks(weights, bits), bits)[:, :size]
    unseen = correlated(400, size, 1)[::-1]
    errors = [float(np.square(unseen @ (found - weights).T).mean()) for found in (stored, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_a_column_that_no_row_has_is_no_trouble() -> None:
    weights = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    rows = correlated(100, 64, 2)
    rows[:, 5] = 0
    rounded, ends = round_calibrated(weights, (rows.T @ rows).astype(np.float64), Grid(4))
    assert np.isfinite(dequantised(*packed_blocks(rounded, 4, ends), 4)).all()


def test_second_moments_are_those_of_the_rows(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dims = read_engine_file(tiny_engine).dims
    told: list[tuple[int, int]] = []
    (whole,) = second_moments(tiny_engine, dims, TEXTS, lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]
    # Queries, keys and values; output; gate and up; down: of each layer. Three maps, and the head.
    assert len(whole) == 4 * 4 + 3 + 1
    compute = tapped_session(tiny_engine, list(whole))
    for name, moments in whole.items():
        expected = np.zeros_like(moments)
        for text in TEXTS:
            (rows,) = compute([name], gptq.inputs_of_text(text, dims))
            flat = rows.reshape(-1, rows.shape[-1])
            expected += flat.T @ flat
        np.testing.assert_allclose(moments, expected, rtol=1e-5, err_msg=name)
    monkeypatch.setattr(gptq, "GATHERED_AT_ONCE", 20_000)
    parts = list(second_moments(tiny_engine, dims, TEXTS))
    assert len(parts) > 3
    assert [name for part in parts for name in part] == list(whole)
    for part in parts:
        for name, moments in part.items():
            np.testing.assert_array_equal(moments, whole[name])


def test_a_calibrated_graph_is_nearer_and_nothing_is_left_out(tiny_engine: Path, tmp_path: Path) -> None:
    dims = read_engine_file(tiny_engine).dims
    expected = record(OnnxRuntimeEngine(tiny_engine, dims, threads=1), tokens=TEXTS[0])
    nearest, calibrated = tmp_path / "nearest.onnx", tmp_path / "calibrated.onnx"
    quantise(tiny_engine, nearest, STORED["int4"])
    quantise(tiny_engine, calibrated, STORED["int4"], second_moments(tiny_engine, dims, TEXTS))
    sizes = {path: path.with_name(f"{path.name}.data").stat().st_size for path in (nearest, calibrated)}
    assert len(set(sizes.values())) == 1
    found = {
        path: np.mean([one.of_norm for one in compare(OnnxRuntimeEngine(path, dims, threads=1), expected)])
        for path in sizes
    }
    assert found[calibrated] < found[nearest]


def test_an_engine_says_how_it_was_quantised(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "engine.onnx"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me about the number {n}."}) + "\n" for n in range(5)))
    arguments = [str(tiny_checkpoint), "--transfer", str(tiny_transfer), "--out", str(out)]
    assert cli.main([*arguments, "--precision", "int4", "--calibrate", str(prompts)]) == 0
    assert read_engine_file(out).parity["quantisation"] == {"method": "GPTQ", "texts": 5}
    assert len(Generator(out, threads=1, adapt=False).generate("Hello", max_new_tokens=5).tokens) == 5
    capsys.readouterr()
    assert cli.main([*arguments, "--calibrate", str(prompts)]) == 1
    assert "--calibrate: nothing is quantised in fp32" in capsys.readouterr().err
    assert cli.main([*arguments, "--precision", "int4", "--calibrate", "nowhere"]) == 1
    assert "no prompts file at nowhere" in capsys.readouterr().err
