"""What exporting and running a model needs, by the headers of its files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ht_export.doctor.software import BUILDING, has, install_line
from runtime.errors import InputError

# As `ht_export.preflight` has them, which imports what may be missing: of the disk, a multiple of the weights and a
# constant besides; of memory, a constant for all but the weights.
SPACE_FACTOR = 1.05
SPACE_CONSTANT = 64 << 20
MEMORY_CONSTANT = 1 << 30
# Bytes of a weight.
FLOAT32 = 4


@dataclass(frozen=True)
class Needs:
    """What a model needs as a float32 engine, the largest: int8 and int4 ones are smaller."""

    model: str
    parameters: int
    engine_bytes: int
    export_disk_bytes: int
    export_memory_bytes: int
    run_memory_bytes: int


def needs_of(source: str) -> Needs:
    """Return what a model needs, or an engine that is exported. Raises `InputError` for one that cannot be found, and
    where what reads checkpoints is not installed.
    """
    path = Path(source)
    if path.suffix in (".onnx", ".plan"):
        return _engine(path)
    if missing := [module for module in BUILDING if not has(module)]:
        raise InputError(
            f"what {source} needs is not known: reading checkpoints needs {', '.join(missing)}; "
            f"{install_line('export')}"
        )
    from ht_export.model.locate import locate, stored_weights

    found = stored_weights(locate(source), None)
    if found is None:
        raise InputError(f"the weights of {source} are not on this machine; fetch them, or give a folder or .gguf file")
    return needs(source, found.parameters)


def needs(source: str, parameters: int) -> Needs:
    """Return what a model of so many parameters needs."""
    weights = parameters * FLOAT32
    return Needs(
        source,
        parameters,
        weights,
        int(SPACE_FACTOR * weights) + SPACE_CONSTANT,
        # Weights are mapped, and converted one at a time; the graph is run in the end.
        weights + MEMORY_CONSTANT,
        weights + MEMORY_CONSTANT // 2,
    )


def _engine(path: Path) -> Needs:
    if not path.is_file():
        raise InputError(f"there is no engine at {path}; give one that ht-export made, or a model")
    stem = re.escape(path.stem)
    files = [one for one in path.parent.iterdir() if re.match(rf"{stem}\.", one.name) and one.is_file()]
    size = sum(one.stat().st_size for one in files)
    return Needs(str(path), 0, size, 0, 0, size + MEMORY_CONSTANT // 2)
