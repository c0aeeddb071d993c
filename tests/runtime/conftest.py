from __future__ import annotations

import json
from pathlib import Path


def change(engine: Path, **changes: object) -> None:
    """Change fields of an engine's description."""
    path = engine.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
