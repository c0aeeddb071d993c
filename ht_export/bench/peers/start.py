"""Starts the worker of a peer in any Python: `python start.py NAME`, with this package found where it lies.

The Python may be of another environment, so nothing of ours is on its path, and nothing beside this file is to hide one
of its own packages.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = "ht_export.bench.peers"


def main() -> None:
    """Run the worker that is asked for until it is told to end."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if not place or Path(place).resolve() != here]
    folder, name = here, PACKAGE
    while name:
        if name not in sys.modules:
            package = ModuleType(name)
            package.__path__ = [str(folder)]
            sys.modules[name] = package
        folder, name = folder.parent, name.rpartition(".")[0]
    worker = importlib.import_module(f"{PACKAGE}.workers.{sys.argv[1]}")
    importlib.import_module(f"{PACKAGE}.workers.loop").serve(worker)


if __name__ == "__main__":
    main()
