"""Imports of the packages, the wheel that they make, and a runtime without what only the exporter needs."""

import ast
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.conftest import shared

ROOT = Path(__file__).parent.parent
PACKAGES = ("ht_export", "plugins", "runtime")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a wheel, made from a copy, so that nothing in it is of an earlier build."""

    def build(folder: Path) -> None:
        project = folder / "project"
        project.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, project)
        for name in PACKAGES:
            shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--wheel-dir", folder / "dist", project], check=True)

    (path,) = (shared(tmp_path_factory, "wheel", build) / "dist").glob("*.whl")
    return path


def test_imports_run_one_way() -> None:
    """The layers of every package are in pyproject.toml. In a process of its own: the linter turns all loggers off."""
    program = (
        "import sys; from importlinter.cli import lint_imports as lint; sys.exit(lint(config_filename=sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(ROOT / "pyproject.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_need_nothing_installed() -> None:
    local = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    for path in (ROOT / "scripts").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            odd = {name.split(".")[0] for name in names} - sys.stdlib_module_names - local
            assert not odd, f"{path.relative_to(ROOT)} imports {odd}"


@pytest.mark.parametrize(
    "module",
    [
        "runtime",
        "runtime.engines.tensorrt",
        "runtime.engines.onnxruntime_cuda",
        "runtime.serving.cli",
        "plugins.tensorrt_plugin",
    ],
)
def test_importing_the_runtime_loads_no_engine_library_and_no_model_library(module: str) -> None:
    heavy = (
        "{'torch', 'transformers', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'triton', 'tokenizers', "
        "'jinja2', 'starlette', 'uvicorn', 'prometheus_client'}"
    )
    code = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.network
def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = {name for name in names if name.split("/")[0].endswith(".dist-info")}
        assert names - about == files
        assert any(name.endswith("/licenses/LICENSE") for name in about)
        commands = ConfigParser()
        commands.read_string(archive.read(next(name for name in about if name.endswith("/entry_points.txt"))).decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert dict(commands["console_scripts"]) == project["scripts"]


@pytest.mark.network
def test_twine_finds_nothing_wrong_with_the_wheel(wheel: Path) -> None:
    pytest.importorskip("twine", reason="twine is not installed: pip install '.[dev]'")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.network
def test_an_environment_without_torch_and_transformers_generates(
    wheel: Path, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Install the wheel as a user of the runtime does, and decode with it."""
    # Pip would find the package that it leads to, and install nothing.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    programs = environment / ("Scripts" if sys.platform == "win32" else "bin")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([programs / "python", *pip, f"{wheel}[cpu]"], check=True)
    absent = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'onnx') if u.find_spec(n)])"
    found = subprocess.run(
        [programs / "python", "-c", absent], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert found.stdout.strip() == "[]"
    arguments = [str(tiny_engine), "Hello", "--json", "--max-new-tokens", "9"]
    command: list[str | Path] = [programs / "ht-generate", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    here = [sys.executable, "-m", "runtime.cli", *arguments]
    expected = subprocess.run(here, capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout)["tokens"] == json.loads(expected.stdout)["tokens"]
