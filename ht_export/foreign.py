"""Libraries that read checkpoints: whatever they raise becomes an error that a user can act on."""

from __future__ import annotations

from contextlib import AbstractContextManager

from runtime.errors import InputError
from runtime.foreign import failures


def foreign_code(doing: str, remedy: str) -> AbstractContextManager[None]:
    """Turn an exception of the block into an `InputError`: `doing`, its cause, and `remedy`."""
    return failures(lambda cause: InputError(f"{doing}: {cause}; {remedy}"))
