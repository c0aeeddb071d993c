"""`engine.tuning.json`: how long an engine's steps take on a device, kept beside the engine for every load after.

It has an entry for each device and number of threads, with the engine's hash: a menu of sizes with seconds of each, and
what to begin with (see `runtime.drafting.sizing.AdaptiveSizes`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bindings import GraphDims
from runtime.drafting.sizing import Menu
from runtime.errors import EngineFileError
from runtime.files import write_json
from runtime.tree import MOST_ROWS, TreeSizes

FORMAT = "hidden-transfer-tuning"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Tuning:
    """Measurements of one engine on one device.

    `engine_sha256` is the engine's identity; `rate` and `draft_value` are as for `AdaptiveSizes`. `kind` is "quick" or
    "full"; `about` tells how it was measured.
    """

    device: str
    engine_sha256: str
    menu: Menu
    rate: float = 1.0
    draft_value: float = 0.5
    kind: str = "quick"
    about: dict[str, Any] = field(default_factory=dict)


def tuning_path(engine: Path) -> Path:
    """Return where the tunings of `engine` are kept."""
    return engine.with_suffix(".tuning.json")


def read_tuning(engine: Path, engine_sha256: str, device: str, dims: GraphDims) -> Tuning | None:
    """Return the tuning of `engine` on `device`, None when there is none of this engine.

    Raises `EngineFileError` when the file is damaged or of another version.
    """
    path = tuning_path(engine)
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT or value["version"] != FORMAT_VERSION:
            raise ValueError(f"version ({value['version']!r})")
        entries = [entry for entry in value["tunings"] if entry["device"] == device]
        own = [entry for entry in entries if entry["engine_sha256"] == engine_sha256]
        return _parse(own[0], dims) if own else None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
        raise EngineFileError(
            f"{path} lacks or misstates {error}; delete it, and it is measured again, or run: ht-bench tune {engine}"
        ) from error


def write_tuning(engine: Path, tuning: Tuning) -> None:
    """Put `tuning` beside `engine`, in the place of what there was for its device. Raises `InputError`."""
    path = tuning_path(engine)
    kept: list[Any] = []
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        kept = [
            entry
            for entry in value["tunings"]
            if value["version"] == FORMAT_VERSION
            and entry["device"] != tuning.device
            and entry["engine_sha256"] == tuning.engine_sha256
        ]
    except (OSError, ValueError, KeyError, TypeError):
        # None yet, or none to keep.
        kept = []
    entry = {
        "device": tuning.device,
        "engine_sha256": tuning.engine_sha256,
        "kind": tuning.kind,
        "rate": tuning.rate,
        "draft_value": tuning.draft_value,
        "contexts": list(tuning.menu.contexts),
        "sizes": [
            {
                "tree_rows": sizes.tree_rows,
                "pseudo_rows": list(sizes.pseudo_rows),
                "milliseconds": [round(1e3 * float(seconds), 4) for seconds in tuning.menu.seconds[:, number]],
            }
            for number, sizes in enumerate(tuning.menu.sizes)
        ],
        "about": tuning.about,
    }
    write_json(path, {"format": FORMAT, "version": FORMAT_VERSION, "tunings": [*kept, entry]})


def _parse(entry: dict[str, Any], dims: GraphDims) -> Tuning:
    sizes = tuple(TreeSizes(one["tree_rows"], tuple(one["pseudo_rows"])) for one in entry["sizes"])
    contexts = tuple(entry["contexts"])
    seconds = np.array([one["milliseconds"] for one in entry["sizes"]], dtype=np.float64).T / 1e3
    for one in sizes:
        whole = all(isinstance(rows, int) and rows >= 0 for rows in (one.tree_rows, *one.pseudo_rows))
        if not whole or not 1 <= one.tree_rows <= MOST_ROWS or len(one.pseudo_rows) != dims.num_steps:
            raise ValueError(f"sizes ({one})")
    if not sizes or sizes[0] != TreeSizes.plain(dims.num_steps):
        raise ValueError("sizes (the first are not those of plain decoding)")
    whole = all(isinstance(context, int) and context >= 0 for context in contexts)
    if not whole or not contexts or list(contexts) != sorted(set(contexts)):
        raise ValueError(f"contexts ({contexts})")
    if seconds.shape != (len(contexts), len(sizes)) or not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise ValueError("milliseconds")
    rate, value = float(entry["rate"]), float(entry["draft_value"])
    if not (np.isfinite(rate) and rate > 0 and np.isfinite(value) and value >= 0):
        raise ValueError(f"rate or draft_value ({rate}, {value})")
    if not isinstance(entry["about"], dict):
        raise ValueError("about")
    menu = Menu(sizes, contexts, seconds)
    return Tuning(entry["device"], entry["engine_sha256"], menu, rate, value, entry["kind"], entry["about"])
