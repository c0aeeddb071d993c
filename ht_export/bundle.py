"""The files of an engine that are the tokenizer's and the transfer layers', as the runtime reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedModel

from ht_export.model.checkpoint import BaseModel
from ht_export.model.correction import correction_tables
from ht_export.model.transfer import TransferLayers
from runtime.bundle.engine_file import FileRecord
from runtime.bundle.reading import CHAT_TEMPLATE
from runtime.drafting.draft_tokens import write_draft_tokens
from runtime.errors import InputError, shown
from runtime.tokenizer import tokens_beyond

# What tokenizers call tokens that stand for what is no text, which processors of images and sounds replace. Gemma 3's
# text models have no row for theirs, and so it goes: nothing else makes it of a text than its own name.
PLACEHOLDERS = ("image_token", "audio_token", "video_token")


def check_tokenizer(base: BaseModel) -> None:
    """Raise `InputError` for a tokenizer that no engine can have: without a file of the `tokenizers` library, or with
    tokens that the model does not know; or for a chat template that is too long.
    """
    _described(base)
    _template(base)


def special_tokens(base: BaseModel) -> dict[str, str]:
    """Return the names that a chat template has for special tokens, and their texts."""
    return {
        name: str(token) for name, token in base.tokenizer.special_tokens_map.items() if not isinstance(token, list)
    }


def write_tokenizer(base: BaseModel, folder: Path, stem: str) -> tuple[FileRecord, FileRecord | None]:
    """Write the tokenizer, and the chat template if there is one. Raises `InputError` as `check_tokenizer` does."""
    described, template = _described(base), _template(base)
    path = folder / f"{stem}.tokenizer.json"
    path.write_text(described, encoding="utf-8")
    if not template:
        return FileRecord.of(path), None
    template_path = folder / f"{stem}.chat_template.jinja"
    template_path.write_text(template, encoding="utf-8")
    return FileRecord.of(path), FileRecord.of(template_path)


def _described(base: BaseModel) -> str:
    """Return the contents of `tokenizer.json`."""
    backend: Tokenizer | None = getattr(base.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{base.source} has no fast tokenizer (tokenizer.json); convert its tokenizer first")
    vocab_size = base.model.config.vocab_size
    named = base.tokenizer.special_tokens_map
    placeholders = {str(named[name]) for name in PLACEHOLDERS if name in named}
    beyond = tokens_beyond(backend, vocab_size)
    if odd := {number: token for number, token in beyond.items() if token not in placeholders}:
        raise InputError(
            f"{base.source}: its tokenizer has token {max(odd)} ({shown(odd[max(odd)])}), and the model's vocabulary "
            f"has {vocab_size} tokens; take the tokenizer that belongs to the model, or give the model rows for all "
            "tokens (resize_token_embeddings)"
        )
    if not beyond:
        return backend.to_str(pretty=True)
    described: dict[str, Any] = json.loads(backend.to_str())
    described["added_tokens"] = [one for one in described["added_tokens"] if one["id"] not in beyond]
    return Tokenizer.from_str(json.dumps(described)).to_str(pretty=True)


def _template(base: BaseModel) -> str | None:
    """Return the chat template, if there is one."""
    template = base.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        return None
    try:
        size = len(template.encode())
    except UnicodeEncodeError as error:
        raise InputError(f"{base.source}: its chat template is not text ({error.reason}); correct it") from error
    if size > CHAT_TEMPLATE.most_bytes:
        raise InputError(
            f"{base.source}: its chat template has {size} bytes, and engines take at most {CHAT_TEMPLATE.most_bytes}; "
            "shorten it, or remove it"
        )
    return template


def write_correction(base: PreTrainedModel, transfer: TransferLayers, folder: Path, stem: str) -> FileRecord | None:
    """Write the tables of the token correction, if the transfer layers have one."""
    if transfer.correction is None:
        return None
    path = folder / f"{stem}.correction.npy"
    correction_tables(base, transfer.correction, transfer.draft_tokens).write(path)
    return FileRecord.of(path)


def write_tokens_of_drafts(transfer: TransferLayers, folder: Path, stem: str) -> FileRecord | None:
    """Write the tokens that draft logits are of, where that is not the whole vocabulary."""
    if transfer.draft_tokens is None:
        return None
    path = folder / f"{stem}.draft_tokens.npy"
    write_draft_tokens(transfer.draft_tokens.numpy(), path)
    return FileRecord.of(path)
