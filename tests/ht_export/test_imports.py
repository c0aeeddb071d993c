"""Imports within the exporter run one way."""

import ast
from pathlib import Path

import ht_export

ROOT = Path(ht_export.__file__).parent
# From the ground up: what is in a row imports from the rows above it, and from its own room.
FLOORS = (
    ("progress", "scopes", "example_prompts"),
    ("prompts", "model"),
    ("graph",),
    ("verify",),
    ("quantize", "tensorrt"),
    ("preflight", "bundle"),
    ("settings",),
    ("export",),
    ("training", "bench", "parity"),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(path: Path) -> set[str]:
    """Return the rooms that a module imports, at any depth of it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # "from ht_export import bundle" names a room too.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Modules that are imported by name.
            names.add(node.value)
    return {parts[1] for name in names if (parts := name.split("."))[0] == "ht_export" and len(parts) > 1}


def test_every_room_imports_those_below_it_alone() -> None:
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room != "__init__":
            above = {other for other in imported(path) if other != room and FLOOR[other] >= FLOOR[room]}
            assert not above, f"{path.relative_to(ROOT)} imports {above}"
