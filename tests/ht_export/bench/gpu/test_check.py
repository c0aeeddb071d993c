"""The GPU check without a GPU: engines run on a simulated one, and the kernel's checks on kernels that are none."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ht_export.bench import cli
from ht_export.bench.gpu import cases, check, commits, engines, passes, timing
from ht_export.bench.gpu import parts as gpu_parts
from ht_export.bench.gpu.commits import CommitCase, check_commits
from ht_export.bench.gpu.kernel import check_kernel
from plugins.launch import Scores
from runtime.bundle.engine_file import read_engine_file
from runtime.bundle.places import engine_file_path
from runtime.engines.choosing import DeviceChoices, DeviceOutputs
from runtime.engines.layout import BatchInputs
from runtime.errors import InputError
from runtime.rows import Rows
from tests.ht_export.bench.gpu import parts
from tests.runtime.engines import test_onnxruntime_cuda, test_tensorrt

ROOT = Path(__file__).parents[4]
SETTINGS = ["--prompts", "2", "--max-new-tokens", "12"]

plan = test_tensorrt.plan
onnx_on_gpu = test_onnxruntime_cuda.engine


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run parts in this process, where the simulated GPU is, and repeat little."""
    monkeypatch.setattr(check, "isolated", lambda part, *given, seconds: gpu_parts.guarded(part, *given))
    monkeypatch.setattr(passes, "REPEATS", 2)
    monkeypatch.setattr(passes, "WARMUP", 2)


def report_of(tmp_path: Path, *arguments: Any) -> tuple[int, dict[str, Any]]:
    """Run the command; return its exit status and report."""
    status = cli.main(["gpu", *map(str, arguments), "--json", str(tmp_path / "report.json")])
    return status, json.loads((tmp_path / "report.json").read_text())


def test_a_plan_is_checked_without_torch(
    plan: Path, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    status, report = report_of(tmp_path, "--engine", plan, "--reference", tiny_engine, *SETTINGS)
    (engine,) = report["engines"]
    assert (status, report["faults"]) == (0, [])
    assert engine["about"]["runs_on"] == "tensorrt-rtx 1.7.1.116, native attention"
    assert engine["decoding"]["same_text"] == engine["decoding"]["prompts"] == 2
    assert engine["decoding"]["tokens_per_step"] >= 1
    assert [row["tree_rows"] for row in engine["shapes"]["rows"]] == [4, 8]
    compared = {(row["case"], row["output"]) for row in engine["reference"]["outputs"]}
    assert {("prompt", "logits"), ("tree", "draft_logits"), ("plain", "logits")} <= compared
    tokens = engine["reference"]["tokens"]
    assert tokens["same"] == tokens["count"] > 2
    for section in ("latency", "latency_without_graphs"):
        found = [(row["context"], row["tree_rows"], row["pseudo_rows"]) for row in engine[section]["rows"]]
        assert found == [(128, 1, 0), (128, 4, 12), (128, 8, 24)]
        assert all(row["ms"] > 0 for row in engine[section]["rows"])
    assert [(row["requests"], row["tree_rows"]) for row in engine["requests"]["rows"]] == [(1, 1), (1, 4)]
    assert sys.modules["cuda.bindings"].driver.launched_graphs
    printed = capsys.readouterr().out
    assert "kernel: not checked: torch cannot be imported" in printed
    assert "speculative text is plain text in 2" in printed
    assert "| without CUDA graphs | 128 |" in printed


def test_an_onnx_engine_is_checked(onnx_on_gpu: Path, tmp_path: Path) -> None:
    status, report = report_of(tmp_path, "--no-kernel", "--engine", onnx_on_gpu, "--reference", onnx_on_gpu, *SETTINGS)
    (engine,) = report["engines"]
    assert (status, report["faults"]) == (0, [])
    assert engine["decoding"]["same_text"] == 2
    assert [row["tree_rows"] for row in engine["latency"]["rows"]] == [1, 4, 8, 16, 32]
    assert "latency_without_graphs" not in engine
    counts = [1, 2, 4, 8, 16, 32]
    assert [(row["requests"], row["tree_rows"]) for row in engine["requests"]["rows"]] == [
        (count, size) for count in counts for size in (1, 4)
    ]


def test_a_wrong_engine_is_found(
    plan: Path, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = sys.modules["cuda.bindings"].driver
    vocab = read_engine_file(plan).dims.vocab_size
    enqueue = DeviceChoices.enqueue

    def wrong(
        choices: DeviceChoices,
        batch: Sequence[Rows],
        laid_out: BatchInputs,
        logits: int,
        drafts: int,
        places: Sequence[int] | None = None,
    ) -> list[DeviceOutputs]:
        count = laid_out.logit_count if len(batch[0].logit_rows) > 1 else 0

        def roll() -> None:
            held = driver.at(logits, 4 * count * vocab).view(np.float32).reshape(count, vocab)
            held[:] = np.roll(held, 7, axis=-1)

        driver.enqueue(roll)
        return enqueue(choices, batch, laid_out, logits, drafts, places)

    monkeypatch.setattr(DeviceChoices, "enqueue", wrong)
    status, report = report_of(tmp_path, "--no-kernel", "--engine", plan, "--reference", tiny_engine, *SETTINGS)
    assert status == 1
    for section in ("decoding", "shapes", "reference"):
        assert report["engines"][0][section]["faults"], section
    difference = report["engines"][0]["decoding"]["rows"][0]["difference"]
    assert difference["position"] >= 1
    assert difference["gap"] > 0


def test_what_fails_leaves_the_rest(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    absent = tmp_path / "absent.onnx"
    arguments = ("--no-kernel", "--engine", absent, "--engine", plan, "--reference", absent, *SETTINGS)
    status, report = report_of(tmp_path, *arguments)
    assert status == 1
    first, second = report["engines"]
    assert "no engine at" in first["error"]
    assert "no engine at" in second["reference"]["error"]
    assert second["decoding"]["same_text"] == 2
    assert second["latency"]["rows"]
    assert [fault.split(":")[0] for fault in report["faults"]] == [str(absent), f"{plan}, reference"]
    assert "absent.onnx: not opened" in capsys.readouterr().out


def test_a_reference_of_another_model(plan: Path, tiny_engine: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_engine.parent, tmp_path / "other") / tiny_engine.name
    replace(read_engine_file(other), transfer={"sha256": "of others"}).write(engine_file_path(other))
    for reference, message in ((other, "must have the same model and transfer layers, in fp32"), (plan, "GPU only")):
        status, report = report_of(tmp_path, "--no-kernel", "--engine", plan, "--reference", reference, *SETTINGS)
        assert status == 1
        assert message in report["engines"][0]["reference"]["error"]


def test_no_gpu(tiny_engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "ht_export.bench.gpu", "--engine", tiny_engine, "--json", out],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    report = json.loads(out.read_text())
    assert done.returncode == 1
    assert report["kernel"]["skipped"]
    assert report["engines"][0]["error"]
    assert f"kernel: not checked: {report['kernel']['skipped']}" in done.stdout
    assert report["faults"] == [f"{tiny_engine}: {report['engines'][0]['error']}"]
    assert report["faults"][0] in done.stdout
    assert "Traceback" not in done.stderr


# All that comes with the exporter or an engine, and even with the runtime.
ABSENT = (
    *("transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "gguf", "accelerate", "psutil", "rich"),
    *("tokenizers", "jinja2", "onnxruntime", "ml_dtypes", "matplotlib"),
)
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize("command", ["ht_export.bench.gpu", "ht_export.bench.cli gpu"])
def test_a_machine_with_torch_alone_checks_the_kernel(tmp_path: Path, command: str) -> None:
    # Its processes begin with this file, those of the parts too.
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    folders = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), "--cases", "1"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": folders},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "kernel: not checked: t" in done.stdout
    assert "No module named" not in done.stdout


def test_nothing_to_check(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, _ = report_of(tmp_path, "--no-kernel")
    assert status == 1
    assert "engines: none given; make one with: ht-export smollm2-135m --out engine.plan" in capsys.readouterr().out


def test_a_report_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert check.main(["--no-kernel", "--json", str(tmp_path)]) == 1
    assert "is a folder; give the name of a file" in capsys.readouterr().err


def test_a_report_in_the_place_of_an_engine(tiny_engine: Path, capsys: pytest.CaptureFixture) -> None:
    before = tiny_engine.read_bytes()
    assert check.main(["--no-kernel", "--engine", str(tiny_engine), "--json", str(tiny_engine)]) == 1
    assert "engine.onnx is read here, and what is written would replace it" in capsys.readouterr().err
    assert tiny_engine.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--engine", "engine.bin"],
        ["--cases", "0"],
        ["--limit", "-1"],
        ["--limit", "1000001"],
        ["--prompts", "9" * 5000],
    ],
)
def test_arguments_that_cannot_be(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        check.main(arguments)
    assert arguments[1] in capsys.readouterr().err


def test_parts_in_processes_of_their_own() -> None:
    def sections(part: Callable, *given: Any, seconds: float = 60) -> list[tuple[str, Any]]:
        return list(gpu_parts.isolated(part, *given, seconds=seconds))

    assert sections(parts.right, 5) == [("first", 5), ("second", 6)]
    assert sections(parts.wrong) == [("first", 1), ("error", "RuntimeError: the pass failed")]
    assert sections(parts.crash) == [("first", 1), ("error", "its process ended with status 3")]
    assert sections(parts.hang, seconds=2)[-1] == ("error", "stopped after 2 s; allow more with --limit")


REPORT = {
    "environment": {"gpu": "NVIDIA H100, 580, 81559 MiB"},
    "kernel": {
        "checks": {"cases": 9, "worst_error": {"float16": 4e-4}, "failures": [{"rows": 5}], "faults": ["1 of 9 wrong"]},
        "graph": {"error": "RuntimeError: capture"},
        "commits": {"cases": 100, "wrong": 0, "faults": []},
        "bandwidth": {"copy": 2.9e12, "read": 3.1e12, "bytes_per_second": 3.1e12},
        "speed": {
            "rows": [
                {
                    "model": "llama-3-8b",
                    "context": 4096,
                    "rows": 8,
                    "kernel_us": 11.0,
                    "torch_sdpa_us": 42.5,
                    "torch_sdpa_way": "heads packed",
                    "bandwidth_limit_us": 5.5,
                    "share_of_bandwidth": 0.5,
                }
            ]
        },
    },
    "engines": [
        {
            "path": "engine.plan",
            "about": {"model": "tiny", "dtype": "float16", "runs_on": "tensorrt 10.16", "tree_rows": 16},
            "decoding": {"error": "RuntimeError: the pass failed"},
            "latency": {
                "rows": [
                    {"context": 128, "tree_rows": 1, "ms": 1.25},
                    {"context": 128, "tree_rows": 16, "ms": 1.5},
                    {"context": 512, "tree_rows": 1, "ms": 1.375},
                ],
                "left_out": 1,
            },
            "requests": {
                "rows": [
                    {"requests": 1, "context": 128, "tree_rows": 1, "ms": 1.25},
                    {"requests": 8, "context": 128, "tree_rows": 1, "ms": 1.5},
                    {"requests": 8, "context": 128, "tree_rows": 4, "ms": 2.0},
                ],
                "left_out": 0,
            },
        }
    ],
}


def test_a_stored_report_is_printed() -> None:
    lines = list(check.table(REPORT))
    for line in (
        "NVIDIA H100, 580, 81559 MiB",
        "kernel: 9 cases, 1 wrong; largest relative error: float16 4.0e-04",
        "| llama-3-8b | 4096 | 8 | 11.0 | 42.5 | heads packed | 5.5 | 0.50 |",
        "\nengine.plan: tiny, float16, tensorrt 10.16, tree of 16",
        "| ms | context | plain | 16 |",
        "| as it runs | 128 | 1.25 | 1.50 |",
        "| as it runs | 512 | 1.38 | - |",
        "commits of many requests: 100 cases, 0 wrong",
        "| requests | plain | 4 |",
        "| 1 | 1.25 | - |",
        "| 8 | 1.50 | 2.00 |",
        "\n3 faults",
        "- kernel, checks: 1 of 9 wrong",
        "- kernel, graph: RuntimeError: capture",
        "- engine.plan, decoding: RuntimeError: the pass failed",
    ):
        assert line in lines


torch = pytest.importorskip("torch")


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"head_dim": (16,), "heads": ((1, 1), (4, 2)), "rows": (1, 5), "capacity": (0, 1, 333)}
    monkeypatch.setattr(cases, "GRID", {**cases.GRID, **small})


def rounded(inputs: dict[str, Any], scores: Scores) -> Any:
    return cases.reference(inputs, scores).to(inputs["query"].dtype)


def one_row_short(inputs: dict[str, Any], scores: Scores) -> Any:
    return rounded({**inputs, "cache_length": (inputs["cache_length"] - 1).clamp(min=0)}, scores)


def reads_too_far(inputs: dict[str, Any], scores: Scores) -> Any:
    return rounded(inputs, scores) + inputs["key_cache"].float().sum().to(inputs["query"].dtype)


def refuses(inputs: dict[str, Any], scores: Scores) -> Any:
    raise RuntimeError("the CUDA driver says CUDA_ERROR_INVALID_VALUE")


def forgets_the_window(inputs: dict[str, Any], scores: Scores) -> Any:
    return rounded({name: value for name, value in inputs.items() if name != "first_visible"}, scores)


def forgets_the_cap(inputs: dict[str, Any], scores: Scores) -> Any:
    return rounded(inputs, Scores(scores.scale))


@pytest.mark.usefixtures("small_grid")
def test_a_right_kernel_passes() -> None:
    found = check_kernel(rounded, 48, 0, device="cpu")
    assert found["cases"] == 48
    assert found["faults"] == []
    assert 0 < found["worst_error"]["float16"] < found["worst_error"]["bfloat16"] < 8e-3


@pytest.mark.usefixtures("small_grid")
@pytest.mark.parametrize("kernel", [one_row_short, reads_too_far, refuses, forgets_the_window, forgets_the_cap])
def test_a_wrong_kernel_fails(kernel: Callable) -> None:
    found = check_kernel(kernel, 48, 0, device="cpu")
    assert len(found["failures"]) > 8
    assert "are wrong, the first" in found["faults"][0]
    json.dumps(found, allow_nan=False)


def forgets_the_lengths(case: CommitCase) -> None:
    move(replace(case, lengths=[0] * len(case.lengths)), case)


def commits_where_nothing_was_accepted(case: CommitCase) -> None:
    move(replace(case, accepted=[rows or [0] for rows in case.accepted]), case)


def commits_elsewhere(case: CommitCase) -> None:
    move(replace(case, first=0), case)


def move(done: CommitCase, case: CommitCase) -> None:
    for cache, found in zip(case.caches, commits.committed(done), strict=True):
        cache.copy_(found)


def test_right_commits_pass() -> None:
    assert check_commits(lambda case: move(case, case), 20, 0, device="cpu") == {"cases": 20, "wrong": 0, "faults": []}


@pytest.mark.parametrize("commit", [forgets_the_lengths, commits_where_nothing_was_accepted, commits_elsewhere])
def test_wrong_commits_fail(commit: Callable) -> None:
    found = check_commits(commit, 20, 0, device="cpu")
    assert found["wrong"] > 1
    assert "of 20 commits are wrong, the first number" in found["faults"][0]


def test_a_draw_of_cases_leaves_nothing_out() -> None:
    drawn = cases.cases(1000, 0)
    assert len(set(drawn)) == 1000
    for name, values in cases.GRID.items():
        for other, others in cases.GRID.items():
            pairs = {(getattr(case, name), getattr(case, other)) for case in drawn}
            assert len(pairs) == (len(values) * len(others) if name != other else len(values))
    assert cases.cases(10**6, 0) != cases.cases(10**6, 1)


@pytest.mark.parametrize("heads", [(1, 2), (3, 2)])
def test_torch_is_timed_at_the_same_work(heads: tuple[int, int]) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = cases.make_inputs(cases.Case("float16", 16, heads, 5, 37, 2), generator)
    inputs["cache_length"].fill_(37)
    inputs = {name: x.float().nan_to_num(1.0) if x.is_floating_point() else x for name, x in inputs.items()}
    expected = cases.reference(inputs, Scores(0.25))
    for way, work in timing.torch_ways(inputs, 0.25).items():
        found = work().reshape(expected.shape).double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda text, way=way: f"{way}: {text}")


def test_kernels_that_are_exchanged_are_one_error(plan: Path) -> None:
    about = read_engine_file(plan)
    plan.with_name("engine.kernels.bin").write_bytes(b"others")
    with pytest.raises(InputError, match=r"engine\.kernels\.bin is not the file that engine\.json describes"):
        engines.open_engine(plan, about, True)
