"""Checks that need a GPU: the compiled kernel against its definition, and texts of a plan built for this GPU."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from ht_export.bench.gpu import check as gpu_check
from ht_export.export import UNTRAINED, ExportSettings, export
from ht_export.tensorrt.planner import PlanSettings
from tests.conftest import save_checkpoint, tiny_llama

pytestmark = pytest.mark.gpu

QUIETLY = lambda _: nullcontext(lambda _: None)  # noqa: E731


def test_the_compiled_kernel_computes_its_definition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--cases", "200", "--json", str(tmp_path / "report.json")]) == 0, capsys.readouterr().out


def test_a_plan_writes_its_own_plain_text_and_computes_what_the_cpu_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    checkpoint = str(save_checkpoint(tmp_path / "model", tiny_llama(head_dim=64)))
    plan, reference, report = tmp_path / "fp16/e.plan", tmp_path / "fp32/e.onnx", tmp_path / "report.json"
    settings = ExportSettings(tree_rows=4, chunk=16, max_context=128)
    export(checkpoint, UNTRAINED, plan, settings, QUIETLY, PlanSettings(runtime="tensorrt-rtx", max_rows=8))
    export(checkpoint, UNTRAINED, reference, settings, QUIETLY)
    engines = ["--engine", str(plan), "--reference", str(reference), "--prompts", "2", "--max-new-tokens", "12"]
    assert gpu_check.main(["--no-kernel", *engines, "--json", str(report)]) == 0, capsys.readouterr().out
    assert json.loads(report.read_text())["engines"][0]["decoding"]["same_text"] == 2
