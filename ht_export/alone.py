"""One process at a time at a file or folder: a second one is told, before the same work is done twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from runtime.errors import InputError
from runtime.files import unwritable


@contextlib.contextmanager
def alone(path: Path, busy: str) -> Iterator[None]:
    """Keep `path` for this process, by a file beside it. Raises `InputError`, saying that `busy`, while another has it.

    A lock that is held ends with its process, however that ends.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(busy) from None
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield
    finally:
        # While it is held: who waits for a file that is gone looks again.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
