"""The software: libraries and their versions, which commands and extras are usable, and what installs the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass

PROJECT = "hidden-transfer"
# Seconds that importing a library may take.
PATIENCE = 60.0
# Libraries that are told of, by what they are for.
LIBRARIES = {
    "the runtime": ("numpy", "tokenizers", "jinja2", "msgspec"),
    "engines": ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings"),
    "structured answers": ("llguidance",),
    "the server": ("starlette", "uvicorn", "prometheus-client", "ray"),
    "building": ("torch", "transformers", "gguf", "accelerate", "safetensors", "onnx", "onnxscript", "triton"),
    "measuring": ("matplotlib", "httpx", "tensorboard"),
}
# Modules that any of lets an engine run, and those that a command cannot do without, with the extra that brings them.
ENGINES = ("onnxruntime", "tensorrt", "tensorrt_rtx")
BUILDING = (
    "torch",
    "transformers",
    "gguf",
    "accelerate",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "rich",
    "psutil",
    "filelock",
)
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "ht-generate": ((), "cpu"),
    "ht-serve": (("starlette", "uvicorn", "h11", "anyio", "prometheus_client"), "serve,cpu"),
    "ht-export": (BUILDING, "export"),
    "ht-parity": (BUILDING, "export"),
    "ht-train": ((*BUILDING, "tensorboard", "matplotlib"), "train"),
    "ht-bench": ((*BUILDING, "matplotlib", "httpx"), "bench"),
    "ht-doctor": ((), ""),
}
RUN_ENGINES = ("ht-generate", "ht-serve")
# What is asked of a library by importing it: in another process, as one that is broken may end it.
PROVIDERS = "import json, onnxruntime as o; print(json.dumps([o.__version__, o.get_available_providers()]))"
TORCH = "import json, torch as t; print(json.dumps([t.__version__, t.version.cuda, t.cuda.is_available()]))"


@dataclass(frozen=True)
class Command:
    """One of our commands: `missing` modules, and the line that installs what has them."""

    name: str
    missing: list[str]
    install: str | None


@dataclass(frozen=True)
class Extra:
    """An extra of the package: packages that are `missing`, and those of a version that is not `wanted`."""

    name: str
    missing: list[str]
    unfit: list[str]

    @property
    def install(self) -> str:
        """The line that installs it."""
        return install_line(self.name)


def install_line(extras: str) -> str:
    """Return the line that installs extras of the package."""
    return f"pip install '{PROJECT}[{extras}]'"


def version_of(package: str) -> str | None:
    """Return the version of an installed package, None where there is none, without importing it."""
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError, OSError):
        return None


def libraries() -> dict[str, dict[str, str | None]]:
    """Return the version of each library, by what they are for."""
    return {use: {name: version_of(name) for name in names} for use, names in LIBRARIES.items()}


def commands() -> list[Command]:
    """Return whether each command finds what it needs."""
    found = []
    for name, (modules, extra) in COMMANDS.items():
        missing = [module for module in modules if not has(module)]
        if name in RUN_ENGINES and not any(map(has, ENGINES)):
            missing.append("an engine library, such as onnxruntime")
        found.append(Command(name, missing, install_line(extra) if missing else None))
    return found


def has(module: str) -> bool:
    """Return whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def extras() -> list[Extra]:
    """Return which packages of each extra are there, by what the package itself says; nothing where it is not there."""
    try:
        stated = importlib.metadata.requires(PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found: dict[str, list[str]] = {}
    for requirement in stated:
        wanted, _, marker = requirement.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", marker)
        if extra and not wanted.startswith(PROJECT):
            found.setdefault(extra[1], []).append(wanted.strip())
    return [_extra(name, wanted) for name, wanted in sorted(found.items()) if name != "dev"]


def _extra(name: str, wanted: list[str]) -> Extra:
    missing, unfit = [], []
    for requirement in wanted:
        package = re.split(r"[\s<>=!~\[(;]", requirement, maxsplit=1)[0]
        version = version_of(package)
        if version is None:
            missing.append(package)
        elif not _fits(version, requirement):
            unfit.append(f"{package} {version} (wanted: {requirement})")
    return Extra(name, missing, unfit)


def _fits(version: str, requirement: str) -> bool:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        # It came with none of what is installed; pip sees to it.
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def onnxruntime() -> tuple[list[str], str | None]:
    """Return ONNX Runtime's providers, and why it cannot be imported where it cannot; neither where there is none."""
    found, cause = _asked("onnxruntime", PROVIDERS)
    return (found[1] if found else []), cause


def torch_cuda() -> tuple[str | None, bool | None]:
    """Return the CUDA that torch was built for, and whether it finds a GPU; None for no torch, or one without CUDA."""
    found, _ = _asked("torch", TORCH)
    return (found[1], found[2]) if found else (None, None)


def _asked(module: str, program: str) -> tuple[list | None, str | None]:
    if not has(module):
        return None, None
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return None, f"importing {module} took more than {PATIENCE:g} s"
    except OSError as error:
        return None, f"Python cannot be started ({error.strerror or error})"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        ending = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        return None, f"importing {module} ended with {ending}" + (f": {lines[-1]}" if lines else "")
    try:
        return json.loads(done.stdout.strip().splitlines()[-1]), None
    except (ValueError, IndexError):
        return None, f"{module} did not tell its version"
