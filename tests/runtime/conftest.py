from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def engine_copy(tiny_engine: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_engine.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / tiny_engine.name


def change(engine: Path, **changes: object) -> None:
    """Change fields of an engine's description."""
    path = engine.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
