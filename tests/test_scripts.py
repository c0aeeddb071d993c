"""What runs before anything is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.modules import module_at

ENVIRONMENT = module_at("scripts/environment.py")
ROOT = Path(__file__).resolve().parents[1]


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_commands_that_run_together_all_end_before_the_first_failure_is_told(tmp_path: Path) -> None:
    done = tmp_path / "done"
    slow = python(f"import time; time.sleep(0.3); open({str(done)!r}, 'w')")
    with pytest.raises(SystemExit) as end:
        ENVIRONMENT.run_together(python("raise SystemExit(3)"), slow)
    assert end.value.code == 3
    assert done.exists()


def test_an_environment_that_fits_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[str] = []

    def install(folder: Path, python: Path, extra: str, weights: bool) -> None:
        folder.mkdir()
        installed.append(extra)

    monkeypatch.setattr(ENVIRONMENT, "_install", install)
    folder = tmp_path / "venv"
    programs = ENVIRONMENT.prepare("docs", folder, weights=False)
    assert ENVIRONMENT.prepare("docs", folder, weights=False) == programs
    assert installed == ["docs"]


@pytest.mark.parametrize("name", ["quickstart", "test", "serve", "docs"])
def test_a_script_says_what_it_does_before_it_sets_anything_up(name: str) -> None:
    script = ROOT / "scripts" / f"{name}.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert f"python3 scripts/{name}.py" in done.stdout
    assert "Setting up" not in done.stdout
