"""The documents build as a site without a warning, and the site asks for nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.modules import ROOT, module_at

pytest.importorskip("material", reason="the documents' own extra is not installed: pip install '.[docs]'")
pytest.importorskip("mkdocstrings", reason="the documents' own extra is not installed: pip install '.[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    tags = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"(https?:)?//[^\"]*\"[^>]*>")
    for path in site.rglob("*.html"):
        assert (found := tags.search(path.read_text(encoding="utf-8"))) is None, f"{path.name}: {found and found[0]}"
    for path in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", path.read_text(encoding="utf-8")), path.name


def test_the_reference_has_the_docstrings_and_the_commands_their_options(site: Path) -> None:
    reference = (site / "reference.html").read_text(encoding="utf-8")
    for name in ("runtime.generator.Generator.generate", "runtime.errors.BusyError", "runtime.serving.app.create_app"):
        assert f'id="{name}"' in reference
    commands = (site / "commands.html").read_text(encoding="utf-8")
    assert "--random-transfer" in commands
    assert 'id="ht-bench-load"' in commands


def test_pictures_are_as_their_programs_draw_them() -> None:
    speed = module_at("docs/draw_speed.py")
    assert speed.PICTURE.read_text(encoding="utf-8") == speed.draw(), "draw it again: python docs/draw_speed.py"
