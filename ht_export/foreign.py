"""Code of others that reads files of others: whatever it raises becomes an error that a user can act on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from runtime.errors import InputError
from runtime.formats import LONGEST_CAUSE


@contextlib.contextmanager
def foreign_code(doing: str, remedy: str) -> Iterator[None]:
    """Turn an exception of the block into an `InputError`: `doing`, its cause, and `remedy`.

    So are panics of libraries in Rust, which are no `Exception`; an interrupt, or an exit, goes through.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # The class is `pyo3_runtime.PanicException`, one for each library and none to import.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{doing}: {first_line(error)}; {remedy}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of what `error` says, cut short; its class where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:LONGEST_CAUSE]
