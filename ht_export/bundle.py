"""The files of an engine that are the tokenizer's and the transfer layers', as the runtime reads them."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ht_export.model.checkpoint import BaseModel
from ht_export.model.correction import correction_tables
from ht_export.model.transfer import TransferLayers
from runtime.bundle.engine_file import FileRecord
from runtime.errors import InputError


def write_tokenizer(base: BaseModel, folder: Path, stem: str) -> tuple[FileRecord, FileRecord | None]:
    """Write the tokenizer, and the chat template if there is one. Raises `InputError` for a tokenizer without a file
    of the `tokenizers` library.
    """
    backend = getattr(base.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{base.source} has no fast tokenizer (tokenizer.json); convert its tokenizer first")
    path = folder / f"{stem}.tokenizer.json"
    path.write_text(backend.to_str(pretty=True), encoding="utf-8")
    template = base.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        return FileRecord.of(path), None
    template_path = folder / f"{stem}.chat_template.jinja"
    template_path.write_text(template, encoding="utf-8")
    return FileRecord.of(path), FileRecord.of(template_path)


def write_correction(base: PreTrainedModel, transfer: TransferLayers, folder: Path, stem: str) -> FileRecord | None:
    """Write the tables of the token correction, if the transfer layers have one."""
    if transfer.correction is None:
        return None
    path = folder / f"{stem}.correction.npy"
    correction_tables(base, transfer.correction).write(path)
    return FileRecord.of(path)
