"""The engine that answers the prompts of training data: one that is there, or one exported for it."""

from __future__ import annotations

from pathlib import Path

from ht_export.export import export
from ht_export.model.checkpoint import load_base_model
from ht_export.model.known import KNOWN_MODELS
from ht_export.model.shipped import UNTRAINED
from ht_export.progress import Stage
from ht_export.quantize.precision import name_of
from ht_export.settings import ExportSettings
from runtime.bundle.engine_file import read_engine_file
from runtime.bundle.places import ENGINE_SUFFIXES, engine_file_path
from runtime.errors import InputError
from runtime.files import sha256_file


def data_engine(
    model: str,
    folder: Path,
    precision: str | None,
    transfer: Path | None,
    stage: Stage,
    adapters: tuple[Path, ...] = (),
) -> Path:
    """Return an engine of `model` with the adapters, exported into `folder` unless it is there.

    `model` may be an engine itself. `transfer` None takes the transfer layers that are shipped for it, else untrained
    ones: with them, text that repeats itself is all that is drafted. Raises `InputError`.
    """
    given = Path(model)
    if given.suffix in ENGINE_SUFFIXES:
        for name, value in (("precision", precision), ("transfer", transfer), ("adapter", adapters or None)):
            if value is not None:
                raise InputError(f"--{name} is for models that are exported; {model} is an engine")
        return given
    precision = precision or "fp32"
    engine = folder / f"engine-{precision}" / "engine.onnx"
    if engine_file_path(engine).is_file():
        base = load_base_model(model, adapters=adapters)
        about = read_engine_file(engine)
        if about.base_model != base.identity() or about.precision != name_of(precision):
            raise InputError(f"{engine} is an engine of another model; choose a new folder, or delete that one")
        if transfer is not None and about.transfer.get("sha256") != sha256_file(transfer):
            raise InputError(
                f"{engine} has other transfer layers than {transfer}; leave --transfer out, or delete the engine (the "
                "answers are the same)"
            )
        return engine
    engine.parent.mkdir(parents=True, exist_ok=True)
    drafts = transfer if transfer is not None or model in KNOWN_MODELS else UNTRAINED
    export(model, drafts, engine, ExportSettings(precision=precision, adapters=adapters), stage)
    return engine
