"""Checks that need a GPU: compiled kernels against their definitions, and texts of a plan built for this GPU."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from ht_export.bench.gpu import check as gpu_check
from ht_export.export import UNTRAINED, ExportSettings, export
from ht_export.tensorrt.planner import PlanSettings
from plugins.binaries import COMMIT_ARCHITECTURES, KernelBinaries, best_architecture
from runtime.engines.cuda import Cuda
from tests.conftest import save_checkpoint, tiny_llama
from tests.runtime.engines.test_choosing import Pass, assert_same_choices, different_requests

pytestmark = pytest.mark.gpu

QUIETLY = lambda _: nullcontext(lambda _: None)  # noqa: E731


def test_the_compiled_kernel_computes_its_definition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--cases", "200", "--json", str(tmp_path / "report.json")]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("vocab_size", [97, 49152, 128256])
def test_choices_on_the_gpu_are_the_hosts(vocab_size: int) -> None:
    from plugins.compile import compile_choosing

    capability = best_architecture(*Cuda().capability, COMMIT_ARCHITECTURES)
    assert capability is not None
    one = Pass(vocab_size, KernelBinaries("float16", 64, compile_choosing(vocab_size, [capability])))
    for _ in range(20):
        for found, host in zip(*one.run(different_requests(one)), strict=True):
            assert_same_choices(found, host)


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
