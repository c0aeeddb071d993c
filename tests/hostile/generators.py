"""All kinds of hostile input, in groups that share what they import, which takes long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from tests.hostile.cases import Kind, Kinds

# Those that import least come first.
GROUPS = {
    "engine files": "engine_kinds",
    "requests": "request_kinds",
    "checkpoints": "checkpoint_kinds",
    "build time": "training_kinds",
}


def makers(group: str) -> Kinds:
    """Return what makes each kind of a group."""
    return import_module(f"tests.hostile.{GROUPS[group]}").KINDS


def kinds_of(names: Sequence[str], folder: Path) -> Iterator[tuple[str, Kind]]:
    """Yield the kinds of these names, of kinds or groups, each with its name and its valid files in `folder`."""
    left = set(names)
    for group in GROUPS:
        if not left:
            return
        for name, maker in makers(group).items():
            if group in names or name in names:
                left.discard(name)
                yield name, maker.make(folder / name)
        left.discard(group)
    if left:
        raise SystemExit(f"no kind or group of kinds is called {', '.join(sorted(left))}")
