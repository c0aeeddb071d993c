"""Code of others that reads what others wrote: whatever it raises becomes an error that a user can act on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from runtime.errors import EngineError, InputError, one_line


@contextlib.contextmanager
def failures(error: Callable[[str], InputError | EngineError]) -> Iterator[None]:
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
        raise error(one_line(found)) from found
