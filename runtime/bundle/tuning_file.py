"""`engine.tuning.json`: how long an engine's steps take on a device, kept beside the engine for every load after.

It has an entry for each device and number of threads, with the engine's hash: a menu of sizes with seconds of each, and
what to begin with (see `runtime.drafting.sizing.AdaptiveSizes`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from runtime.bindings import GraphDims
from runtime.bundle.engine_file import MOST_BATCH, MOST_CONTEXT
from runtime.drafting.sizing import BatchMenu, Menu
from runtime.errors import EngineFileError, InputError
from runtime.files import write_json
from runtime.formats import JsonFormat, check_levels
from runtime.tree import MOST_ROWS, PseudoRows, TreeSizes

FORMAT = "hidden-transfer-tuning"
FORMAT_VERSION = 1
MOST_BYTES = 1 << 22
# Sizes on a menu, and contexts: far more than are worth measuring.
MOST_SIZES = 1000
MOST_CONTEXTS = 100


@dataclass(frozen=True)
class Tuning:
    """Measurements of one engine on one device.

    `engine_sha256` is the engine's identity; `batches` have the time of passes of several requests; `rate` and
    `draft_value` are as for `AdaptiveSizes`. `kind` is "quick" or "full"; `about` tells how it was measured.
    """

    device: str
    engine_sha256: str
    menu: Menu
    rate: float = 1.0
    draft_value: float = 0.5
    kind: str = "quick"
    about: dict[str, Any] = field(default_factory=dict)
    batches: tuple[BatchMenu, ...] = ()


@dataclass(frozen=True)
class _Size:
    """Sizes on a menu, with milliseconds [C] of a step at each context."""

    tree_rows: Annotated[int, Meta(ge=1, le=MOST_ROWS)]
    pseudo_rows: tuple[PseudoRows, ...]
    milliseconds: tuple[Annotated[float, Meta(ge=1e-6, le=1e9)], ...]


Contexts = Annotated[tuple[Annotated[int, Meta(ge=0, le=MOST_CONTEXT)], ...], Meta(max_length=MOST_CONTEXTS)]
Sizes = Annotated[tuple[_Size, ...], Meta(min_length=1, max_length=MOST_SIZES)]


@dataclass(frozen=True)
class _Batch:
    """A menu of passes of several requests."""

    requests: Annotated[int, Meta(ge=2, le=MOST_BATCH)]
    contexts: Contexts
    sizes: Sizes


@dataclass(frozen=True)
class _Entry:
    """A tuning as the file has it. What cannot be together raises `ValueError`."""

    device: str
    engine_sha256: str
    kind: str
    rate: Annotated[float, Meta(gt=0.0, le=1e6)]
    draft_value: Annotated[float, Meta(ge=0.0, le=1e6)]
    contexts: Contexts
    sizes: Sizes
    about: dict[str, Any]
    # Earlier releases measured none.
    batches: Annotated[tuple[_Batch, ...], Meta(max_length=MOST_BATCH)] = ()

    def __post_init__(self) -> None:
        check_levels(self.about)
        _check(self.contexts, self.sizes, self.draft_steps)
        for one in self.batches:
            _check(one.contexts, one.sizes, self.draft_steps)
        if any(later.requests <= earlier.requests for earlier, later in pairwise(self.batches)):
            raise ValueError(f"requests {[one.requests for one in self.batches]} do not ascend")

    @property
    def draft_steps(self) -> int:
        return len(self.sizes[0].pseudo_rows)

    @classmethod
    def of(cls, tuning: Tuning) -> _Entry:
        return cls(
            tuning.device,
            tuning.engine_sha256,
            tuning.kind,
            tuning.rate,
            tuning.draft_value,
            tuning.menu.contexts,
            _sizes_of(tuning.menu),
            tuning.about,
            tuple(_Batch(one.requests, one.menu.contexts, _sizes_of(one.menu)) for one in tuning.batches),
        )

    def tuning(self) -> Tuning:
        menu = _menu(self.contexts, self.sizes)
        batches = tuple(BatchMenu(one.requests, _menu(one.contexts, one.sizes)) for one in self.batches)
        return Tuning(
            self.device, self.engine_sha256, menu, self.rate, self.draft_value, self.kind, self.about, batches
        )


def _check(contexts: Contexts, sizes: Sizes, draft_steps: int) -> None:
    if not contexts or any(later <= earlier for earlier, later in pairwise(contexts)):
        raise ValueError(f"contexts {list(contexts)} do not ascend")
    plain = TreeSizes.plain(draft_steps)
    if (sizes[0].tree_rows, sizes[0].pseudo_rows) != (plain.tree_rows, plain.pseudo_rows):
        raise ValueError("the first sizes are not those of plain decoding")
    for size in sizes:
        TreeSizes(size.tree_rows, size.pseudo_rows).check(draft_steps)
        if len(size.milliseconds) != len(contexts):
            raise ValueError(f"{len(size.milliseconds)} milliseconds for {len(contexts)} contexts")


def _menu(contexts: Contexts, sizes: Sizes) -> Menu:
    seconds = np.array([one.milliseconds for one in sizes], dtype=np.float64).T / 1e3
    return Menu(tuple(TreeSizes(one.tree_rows, one.pseudo_rows) for one in sizes), contexts, seconds)


def _sizes_of(menu: Menu) -> Sizes:
    return tuple(
        _Size(
            sizes.tree_rows,
            sizes.pseudo_rows,
            tuple(round(1e3 * float(seconds), 4) for seconds in menu.seconds[:, number]),
        )
        for number, sizes in enumerate(menu.sizes)
    )


@dataclass(frozen=True)
class _Tunings:
    """The file, of this version."""

    format: Literal["hidden-transfer-tuning"]
    version: Literal[1]
    tunings: tuple[_Entry, ...]


REMEDY = "delete it, and it is measured again, or run: ht-bench tune ENGINE"
TUNINGS = JsonFormat("tuning.json", MOST_BYTES, REMEDY, EngineFileError, kind=_Tunings)
# Whatever there is: what it says of itself tells whose the file is.
ANYTHING = JsonFormat[Any]("file in the place of tuning.json", MOST_BYTES, "move it", EngineFileError, kind=Any)


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
    for entry in TUNINGS.read(path).tunings:
        if (entry.device, entry.engine_sha256) == (device, engine_sha256):
            if entry.draft_steps != dims.num_steps:
                raise TUNINGS.unfit(path, f"sizes of {entry.draft_steps} draft steps, not {dims.num_steps}")
            return entry.tuning()
    return None


def holds_tunings(path: Path) -> bool | None:
    """Return whether what is in the file at `path` says that it is tunings, of any release; None where the file is
    damaged and says nothing. Raises `EngineFileError` for one that cannot be read.
    """
    content = ANYTHING.content(path)
    try:
        found = ANYTHING.decode(content, path)
    except InputError:
        return None
    if not isinstance(found, dict | list) or not found:
        return None
    return isinstance(found, dict) and found.get("format") == FORMAT


def check_place_of_tunings(engine: Path) -> None:
    """Raise `InputError` when the file in the place of the tunings of `engine` is of another format. A damaged one is
    of no use to anybody.
    """
    path = tuning_path(engine)
    if path.is_file() and holds_tunings(path) is False:
        raise InputError(
            f"{path} holds something other than tunings, which would be written there; move it, or give the engine "
            "another name"
        )


def write_tuning(engine: Path, tuning: Tuning) -> None:
    """Put `tuning` beside `engine`, in the place of what there was for its device. A damaged file is written anew.
    Raises `InputError`, also for a file of another format in its place.
    """
    check_place_of_tunings(engine)
    path = tuning_path(engine)
    try:
        held = TUNINGS.read(path).tunings
    except InputError:
        # None yet, or none to keep.
        held = ()
    own = _Entry.of(tuning)
    kept = [one for one in held if one.device != own.device and one.engine_sha256 == own.engine_sha256]
    tunings = [asdict(entry) for entry in (*kept, own)]
    write_json(path, {"format": FORMAT, "version": FORMAT_VERSION, "tunings": tunings})
