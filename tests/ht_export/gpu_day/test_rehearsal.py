"""The whole script, in small on a CPU: from a clean copy of the tree, in a folder of its own, with no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ht_export.gpu_day import cli
from ht_export.gpu_day.results import FILE
from tests.conftest import save_checkpoint, tiny_llama

ROOT = Path(__file__).parents[3]
PARTS_OF_THE_TREE = ("ht_export", "runtime", "plugins", "scripts")
# What comes with the exporter or the runtime, and not with torch or Triton.
LIBRARIES = (
    *("transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "gguf", "accelerate", "psutil", "rich"),
    *("tokenizers", "onnxruntime", "ml_dtypes", "matplotlib", "msgspec", "tensorrt_rtx"),
)
# Begins every process: no network, this project not installed, and some packages not there.
ALONE = """
import importlib.metadata
import socket
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
version = importlib.metadata.version

def of_others(name):
    if name == "hidden-transfer":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = of_others
connect = socket.socket.connect

def refuse(self, address):
    if self.family != socket.AF_UNIX:
        raise OSError("this machine has no network")
    return connect(self, address)

socket.socket.connect = refuse
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the script needs of the tree."""
    for name in PARTS_OF_THE_TREE:
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def rehearse(copy: Path, *arguments: str, absent: tuple[str, ...] = ()) -> tuple[subprocess.CompletedProcess, Any]:
    """Run the script in the copy; return its process and results."""
    alone = copy.parent / "alone"
    alone.mkdir(exist_ok=True)
    (alone / "sitecustomize.py").write_text(ALONE.format(absent=absent))
    done = subprocess.run(
        [sys.executable, "scripts/gpu_day.py", "run", "--rehearse", "--results", "results", *arguments],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(alone), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return done, json.loads((copy / "results" / FILE).read_text())


def sections(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{stage}: {name}": value for stage, one in found["stages"].items() for name, value in one["sections"].items()
    }


def test_parts_1_and_3_need_torch_and_triton_alone(copy: Path) -> None:
    done, found = rehearse(copy, "--only", "kernel,step-time", absent=LIBRARIES)
    assert done.returncode == 0, done.stderr
    assert (found["device"], found["rehearsal"]) == ("cpu", True)
    assert all(one["complete"] and one["rehearsal"] for one in found["stages"].values())
    every = sections(found)
    assert every["kernel: checks"]["failures"] == []
    assert every["kernel: checks"]["cases"] == 1
    assert every["kernel: goal"]["rows"][0]["kernel_us"] > 0
    assert every["kernel: graph"]["not_on_a_cpu"] == "capturing CUDA graphs"
    assert len(every["step-time: llama-2-7b float16"]["rows"]) == 3
    assert every["step-time: llama-2-7b float16"]["dtype"] == "float32"
    assert "a rehearsal on a CPU" in done.stdout
    assert "done: kernel, step-time" in done.stdout
    assert not list(copy.rglob("*.tmp"))


@pytest.mark.long
def test_everything_is_rehearsed_with_a_tiny_model(copy: Path) -> None:
    model = str(save_checkpoint(copy.parent / "model", tiny_llama(head_dim=16)))
    done, found = rehearse(copy, "--only", "2,4,5", "--model", model, "--minutes", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    every = sections(found)
    assert every["reference: float32 decoding"]["faults"] == []
    assert every["reference: float32 against fp32"]["faults"] == []
    assert every["end-to-end: reference float32: 2 clients"]["same_text"] == 2
    assert every["training: fit"]["recipe"]["steps"] == 3
    assert every["training: dev prompts"]["tokens_per_step"]
    assert every["answers: answers"]["sequences"] == 3
    assert every["plans: tensorrt-rtx, plugin: engine"]["not_on_a_cpu"] == "executing a plan of tensorrt-rtx"
    assert len(every["sweep: placements"]["sweep"]) > 0
    # What comes back is small, and what is made of it goes on elsewhere.
    kept = {one["name"] for one in found["kept"]}
    assert kept == {"pace.json", "transfer.safetensors", "answers.zip"}
    assert all(path.stat().st_size <= 16 << 20 for path in (copy / "results").iterdir())
    shutil.rmtree(copy / "results.work")
    again, _ = rehearse(copy, "--only", "training", "--model", model)
    assert "training: done before" in again.stderr
    assert (copy / "results.work/training/transfer.safetensors").is_file()


def test_the_list_tells_what_each_part_is_expected_to_take(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in ("kernel", "step-time", "training", "reference", "end-to-end"):
        assert name in printed
    assert "expected in all: " in printed
    assert cli.main(["run", "--list"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--minutes", "0"], "--minutes must be above 0"),
        (["run", "--only", "6"], "'6' is no part"),
        (["run", "--kit", "nowhere"], "--kit: no folder at nowhere"),
        (["pack", "out", "--compute-capability", "90"], "--compute-capability '90' is not of the form 9.0"),
        (["pack", "out", "--python", "three"], "--python 'three' is not of the form 3.12"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    assert words in capsys.readouterr().err
