"""API keys: where they come from, and who has one."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from runtime.errors import InputError
from runtime.formats import Format
from runtime.serving.errors import ApiError

LONGEST_KEY = 1024
KEY_FILE = Format("file of API keys", 1 << 20, "give a text file with a key on each line; lines with # are notes")


class Keys:
    """Keys of which a request must have one; without any, none is asked for.

    Digests are compared, each in constant time and all of them always, so that how long it takes tells nothing.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, authorization: bytes | None) -> None:
        """Raise `ApiError` unless a header `Authorization` has a key."""
        if not self._digests:
            return
        scheme, _, given = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            raise _unknown("no API key was given; send it as 'Authorization: Bearer KEY'")
        digest = _digest(given.strip())
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        if not found:
            raise _unknown("the API key is not known here")


def read_keys(path: Path) -> list[str]:
    """Return the keys of a file, one a line. Raises `InputError` for a file without any, or with odd ones."""
    lines = (line.strip() for line in KEY_FILE.text(path).splitlines())
    return checked_keys([line for line in lines if line and not line.startswith("#")], str(path))


def checked_keys(keys: list[str], where: str) -> list[str]:
    """Return `keys`, which were found at `where`. Raises `InputError` where there is none, or one that no header can
    have.
    """
    if not keys:
        raise InputError(f"{where} has no API key; give at least one")
    for place, key in enumerate(keys, start=1):
        if len(key) > LONGEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            # Not the key itself: errors are logged.
            raise InputError(
                f"API key {place} of {where} is none: keys are up to {LONGEST_KEY} printable ASCII characters without "
                "spaces"
            )
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _unknown(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
