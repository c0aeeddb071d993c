"""A bar on stderr for what takes long; without rich, which `ht-bench` can do without, a line."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(description: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how far the work is; yield what is told the parts done and all that there are."""
    if quiet:
        yield lambda done, total: None
    elif importlib.util.find_spec("rich"):
        from ht_export.progress import progress_bar

        with progress_bar(auto_refresh=False) as bar:
            task = bar.add_task(description, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total, refresh=True)
    else:
        print(f"{description}; with rich installed there is a bar", file=sys.stderr)
        yield lambda done, total: None
