"""A bar on stderr for what takes long; without rich, which `ht-bench` can do without, a line."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.program import Advance


@contextlib.contextmanager
def bar(description: str, quiet: bool) -> Iterator[Advance]:
    """Show how far the work is; yield what is told the parts done and all that there are."""
    if quiet:
        yield lambda done, total: None
    elif importlib.util.find_spec("rich"):
        from ht_export.progress import progress_bar

        with progress_bar(auto_refresh=False) as shown:
            task = shown.add_task(description, total=None)
            yield lambda done, total: shown.update(task, completed=done, total=total, refresh=True)
    else:
        print(f"{description}; with rich installed there is a bar", file=sys.stderr)
        yield lambda done, total: None
