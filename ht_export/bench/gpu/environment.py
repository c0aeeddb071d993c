"""What a report of a GPU says it was measured on: asked of the system, with no library."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "cuda-bindings", "tensorrt", "tensorrt-rtx", "onnxruntime-gpu", "onnxruntime", "numpy")


def environment(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the device and the versions of everything that matters; `arguments` are those of `ht-bench`."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["ht-bench", *arguments]),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["gpu"] = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    found["commit"] = _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")
    return found


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
