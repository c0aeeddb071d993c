"""Plans with quantised weights, built without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ht_export import cli
from ht_export.tensorrt import planner as planner_module
from ht_export.tensorrt.planner import Planner
from runtime.bundle.engine_file import read_engine_file
from runtime.errors import InputError
from tests.ht_export.tensorrt.conftest import PLAN, build

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("triton")

# Products with weights: of four layers four each, of three transfer layers, and of the head.
PRODUCTS = 4 * 4 + 3 + 1


@pytest.mark.parametrize("attention", ["plugin", "native"])
@pytest.mark.parametrize("precision", ["int8", "int4", "fp8"])
def test_every_product_has_quantised_weights(
    wide_checkpoint: Path, wide_transfer: Path, tmp_path: Path, precision: str, attention: str
) -> None:
    settings = replace(PLAN, attention=attention, capabilities=((8, 9),))
    build(wide_checkpoint, wide_transfer, tmp_path / "e.plan", settings, precision)
    about = read_engine_file(tmp_path / "e.plan")
    assert about.plan is not None
    assert (about.precision, about.dims.dtype, about.plan.attention) == (precision, "float16", attention)
    # Products have 32 and 64 inputs; blocks are of 64.
    found = about.plan.build["network_layers"]["DEQUANTIZE"]
    assert found == PRODUCTS if precision != "int4" else 0 < found < PRODUCTS
    assert about.parity["largest_relative_difference"] < 1e-4
    assert 1e-3 < about.parity["of_quantised_weights"] < 2
    assert about.parity["quantisation"] == {"method": "round to nearest", "texts": 0}
    records = (about.graph, about.tokenizer, about.chat_template, about.plan.kernels)
    assert {path.name for path in tmp_path.iterdir()} == {one.name for one in records if one} | {"e.json"}


def test_calibrated_weights_are_nearer(
    wide_checkpoint: Path, wide_transfer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "plan" / "e.plan"
    prompts.write_text("".join(f'{{"prompt": "Tell me about the number {n}."}}\n' for n in range(5)))
    arguments = [str(wide_checkpoint), "--transfer", str(wide_transfer), "--out", str(out), "--runtime", "tensorrt-rtx"]
    limits = ["--compute-capability", "8.0", "--max-context", "128", "--calibrate", str(prompts)]
    assert cli.main([*arguments, *limits, "--precision", "int4"]) == 0
    assert read_engine_file(out).parity["quantisation"] == {"method": "GPTQ", "texts": 5}
    capsys.readouterr()
    assert cli.main([*arguments, *limits[2:], "--precision", "fp8"]) == 1
    assert "--calibrate: weights are rounded to the nearest in fp8" in capsys.readouterr().err.replace("\n", " ")


def test_memory_is_asked_for_the_plans_weights_not_the_graphs(
    wide_checkpoint: Path, wide_transfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or large models would be refused where their plans fit."""
    asked: list[int] = []

    def stop(weight_bytes: int, _: Path) -> None:
        asked.append(weight_bytes)
        raise InputError("no more is wanted")

    monkeypatch.setattr(planner_module, "check_resources", stop)
    for precision in ("fp16", "int8"):
        with pytest.raises(InputError, match="no more is wanted"):
            build(wide_checkpoint, wide_transfer, tmp_path / "e.plan", replace(PLAN, capabilities=((8, 9),)), precision)
    whole, quantised = asked
    assert 0.5 * whole < quantised < 0.75 * whole


def test_a_gpu_without_fp8_is_refused_before_the_work() -> None:
    with pytest.raises(InputError, match=r"--precision fp8: compute capability 8\.0 does not compute in it, only 8\.9"):
        Planner(PLAN, "fp8")
