"""The example of `docs/architecture.md`: the tree of five candidates that its picture shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

SCRIPT = Path(__file__).parents[1] / "docs" / "draw_pass.py"


def drawn() -> ModuleType:
    """Return the script that draws the picture."""
    spec = importlib.util.spec_from_file_location("draw_pass", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE = drawn()
