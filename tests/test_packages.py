"""What the packages may import, and that the runtime is complete without what only the exporter needs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "runtime": {"ht_export", "torch", "transformers", "onnx", "onnxscript", "safetensors", "triton"},
    "plugins": {"ht_export", "runtime", "torch", "transformers"},
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            odd = {name.split(".")[0] for name in names} & FORBIDDEN[package]
            assert not odd, f"{path.relative_to(ROOT)} imports {odd}"


@pytest.mark.parametrize(
    "module", ["runtime", "runtime.engines.tensorrt", "runtime.engines.onnxruntime_cuda", "plugins.tensorrt_plugin"]
)
def test_importing_the_runtime_loads_no_engine_library_and_no_model_library(module: str) -> None:
    heavy = (
        "{'torch', 'transformers', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'triton', 'tokenizers', 'jinja2'}"
    )
    code = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.network
def test_an_environment_without_torch_and_transformers_generates(tiny_engine: Path, tmp_path: Path) -> None:
    """Install the project as a user of the runtime does, and decode with it."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    programs = environment / ("Scripts" if sys.platform == "win32" else "bin")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([programs / "python", *pip, f"{ROOT}[cpu]"], check=True)
    absent = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'onnx') if u.find_spec(n)])"
    found = subprocess.run(
        [programs / "python", "-c", absent], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert found.stdout.strip() == "[]"
    arguments = [str(tiny_engine), "Hello", "--json", "--max-new-tokens", "9"]
    done = subprocess.run(
        [programs / "ht-generate", *arguments], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    here = [sys.executable, "-m", "runtime.cli", *arguments]
    expected = subprocess.run(here, capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout)["tokens"] == json.loads(expected.stdout)["tokens"]
