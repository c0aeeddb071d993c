"""A check that what lies in a folder or a checkpoint belongs to the run that goes on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def first_difference(wanted: Mapping[str, Any], found: Any) -> str | None:
    """Return the first key of `wanted` that `found` lacks or holds another value for, None when there is none.

    Values are compared as JSON keeps them; of nested ones the innermost key is named.
    """
    if not isinstance(found, dict):
        return "content"
    for key, value in json.loads(json.dumps(wanted)).items():
        other = found.get(key)
        if other != value:
            inner = first_difference(value, other) if isinstance(value, dict) else None
            return inner or key
    return None
