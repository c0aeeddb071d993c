"""Code of others that reads what others wrote: whatever it raises becomes an error that a user can act on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from runtime.errors import InputError
from runtime.formats import LONGEST_CAUSE


@contextlib.contextmanager
def failures(error: Callable[[str], InputError]) -> Iterator[None]:
    """Raise the `error` of the cause for whatever is raised in the block, but an `InputError`.

    So it is for panics of libraries in Rust, which are no `Exception`; an interrupt, or an exit, goes through.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as found:
        # The class is `pyo3_runtime.PanicException`, one for each library and none to import.
        if not isinstance(found, Exception) and type(found).__name__ != "PanicException":
            raise
        raise error(first_line(found)) from found


def first_line(error: BaseException) -> str:
    """Return the first line of what `error` says, cut short; its class where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:LONGEST_CAUSE]
