"""Files that a day's own processes have written, read again by later ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.errors import InputError


def read_json(path: Path, remedy: str, version: int | None = None) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises `InputError` with the `remedy` where it is none, or not of the version
    that is asked for.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(found, dict) or (version is not None and found.get("version") != version):
        raise InputError(f"{path} is not of version {version}; {remedy}")
    return found
