"""`ht-doctor`: on this machine, on odd ones, and where nothing but the runtime is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ht_export.doctor import cli, machine, model, software

ROOT = Path(cli.__file__).parents[2]
X86 = "processor\t: 0\nmodel name\t: A Processor\nflags\t\t: fpu avx2 avx512f avx512_vnni\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


def doctor(*arguments: str) -> int:
    return cli.main(list(arguments))


def test_it_tells_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() == 0
    told = capsys.readouterr().out
    for part in ("processor", "memory", "numpy 2.", "ht-generate", "ht-export", "extras"):
        assert part in told


def test_json_has_what_the_text_tells(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["cores"] >= 1
    assert {command["name"] for command in found["commands"]} == set(software.COMMANDS)
    assert "CPUExecutionProvider" in found["onnxruntime"]["providers"]


def test_every_command_of_the_package_is_told_of() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text.split("[project.scripts]")[1].split("\n[")[0]
    assert {line.split(" = ")[0] for line in block.strip().splitlines()} == set(software.COMMANDS)


@pytest.mark.parametrize(
    ("kind", "text", "there", "absent"),
    [
        ("x86_64", X86, ["AVX2", "AVX-512", "VNNI"], ["bf16", "AMX"]),
        ("aarch64", ARM, ["NEON", "i8mm"], ["SVE", "bf16"]),
    ],
)
def test_features_of_a_processor_are_read_from_its_flags(
    kind: str, text: str, there: list[str], absent: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPU_FILE", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: kind)
    features = machine.look(tmp_path).features
    assert features is not None
    assert [name for name, has in features.items() if has and name in there] == there
    assert not any(features[name] for name in absent)


def test_a_machine_that_tells_nothing_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "CPU_FILE", tmp_path / "none")
    monkeypatch.setattr(machine, "MEMORY_FILE", tmp_path / "none")
    monkeypatch.setattr(machine, "_by_sysconf", lambda: None)
    monkeypatch.setattr(machine, "_free", lambda _: None)
    monkeypatch.setattr("platform.machine", lambda: "")
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr(software, "version_of", lambda _: None)
    monkeypatch.setattr(software, "has", lambda _: False)
    monkeypatch.setenv("PATH", "")
    assert doctor() == 0
    told = capsys.readouterr().out
    assert "unknown" in told
    assert "no NVIDIA driver" in told
    assert "lacks an engine library" in told
    assert "no engine can be run: pip install 'hidden-transfer[cpu]'" in told


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "nvidia-smi failed: Failed to"),
        ("printf '\\377\\376 nonsense\\n'", "nvidia-smi tells of no GPU"),
        ("exec sleep 60", "nvidia-smi did not answer"),
        ("kill -9 $$", "nvidia-smi failed"),
    ],
)
def test_a_driver_that_is_broken_is_told_of(
    program: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tool(tmp_path, program, monkeypatch)
    monkeypatch.setattr(machine, "PATIENCE", 1.0)
    found, cause = machine.gpus()
    assert not found
    assert cause is not None
    assert cause.startswith(told)


def test_a_gpu_that_nothing_uses_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _tool(tmp_path, "echo 'NVIDIA H200, 570.1, 9.0, 143771 MiB, 143000 MiB'", monkeypatch)
    monkeypatch.setattr(software, "version_of", lambda _: None)
    assert doctor() == 0
    told = capsys.readouterr().out
    assert "NVIDIA H200, compute capability 9.0, driver 570.1" in told
    assert "there is a GPU that nothing here uses" in told


def test_a_library_that_cannot_be_imported_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, body in enumerate(("raise ImportError('libcuda.so.1: no such file')", "import os; os.abort()")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "onnxruntime.py").write_text(body)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        providers, cause = software.onnxruntime()
        assert not providers
        assert cause is not None
        assert ("libcuda.so.1" if number == 0 else "signal 6") in cause


def test_extras_have_the_line_that_installs_them() -> None:
    extra = software._extra("odd", ["no-such-package-at-all>=1", "numpy>=1000"])
    assert extra.missing == ["no-such-package-at-all"]
    assert extra.install == "pip install 'hidden-transfer[odd]'"


def test_what_a_model_needs_grows_with_its_parameters() -> None:
    small, large = model.needs("small", 10**8), model.needs("large", 10**10)
    assert small.engine_bytes == 4 * 10**8
    assert large.export_disk_bytes > 50 * small.export_disk_bytes
    assert small.run_memory_bytes > small.engine_bytes


@pytest.mark.parametrize(("free", "fits"), [(1 << 50, True), (1 << 20, False)])
def test_a_model_that_does_not_fit_is_told_of(
    free: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "engine.onnx").write_bytes(bytes(1000))
    (tmp_path / "engine.onnx.data").write_bytes(bytes(9000))
    monkeypatch.setattr(cli, "available_bytes", lambda: free)
    assert doctor(str(tmp_path / "engine.onnx"), "--json") == (0 if fits else 1)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["model"]
    assert found["engine_bytes"] == 10_000
    assert (found["problem"] is None) == fits


def test_a_model_that_is_not_there_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("no-such-engine.onnx") == 1
    assert "there is no engine at no-such-engine.onnx" in capsys.readouterr().out


def test_it_runs_with_nothing_but_the_runtime_installed() -> None:
    """As in an environment with the bare package: what is not of it cannot be imported."""
    allowed = ("numpy", "tokenizers", "jinja2", "markupsafe", "msgspec", "runtime", "plugins", "ht_export")
    code = (
        "import sys\n"
        "class Bare:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        top = name.split('.')[0]\n        if top not in sys.stdlib_module_names and top not in {allowed!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Bare())\n"
        "from ht_export.doctor.cli import main\n"
        "sys.exit(main(['--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    lacking = {command["name"] for command in found["commands"] if command["missing"]}
    assert lacking == set(software.COMMANDS) - {"ht-doctor"}


def _tool(folder: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{program}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
