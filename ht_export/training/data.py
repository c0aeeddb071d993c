"""The data folder: self-distillation text in shards, and the manifest that says what it was made from.

`manifest.json` names the base model, the prompts and the settings; `shard-0-00000.jsonl` (turn, number) and so on
hold one answer a line: `{"id": ..., "task": ..., "prompt": [token ids], "answer": [token ids]}`. The prompt of a later
turn holds the turns and answers before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ht_export.model.checkpoint import BaseModel
from ht_export.training.identity import first_difference
from runtime.errors import InputError
from runtime.files import atomic_path, write_json

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2


@dataclass(frozen=True)
class AnsweredPrompt:
    """One prompt with the base model's answer, as token ids."""

    id: str
    task: str
    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def tokens(self) -> list[int]:
        """The whole text."""
        return self.prompt + self.answer


def fingerprint(sequences: Sequence[AnsweredPrompt]) -> str:
    """Return a SHA-256 of the sequences' tokens, which tells two sets of data apart."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(json.dumps([sequence.prompt, sequence.answer]).encode())
    return digest.hexdigest()


class DataFolder:
    """A data folder that is being made. Raises `InputError` when it holds data made otherwise."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = {"version": MANIFEST_VERSION, **manifest}
        self._names: list[str] = []
        existing = path / MANIFEST
        # Settings may still change while no answer depends on them.
        if any(path.glob("shard-*.jsonl")):
            if not existing.is_file():
                raise InputError(f"{path} holds shards without a {MANIFEST}; choose a new folder, or delete them")
            differing = first_difference(self.manifest, _read_manifest(existing))
            if differing:
                raise InputError(
                    f"{path} holds data made with another {differing}; choose a new folder, or repeat the earlier "
                    "settings"
                )
        else:
            write_json(existing, {**self.manifest, "shards": None})

    def shard(self, turn: int, number: int, prompts: Sequence[list[int]]) -> list[AnsweredPrompt] | None:
        """Return the answers to `prompts` when they were written before, else None."""
        path = self._shard_path(turn, number)
        if not path.exists():
            return None
        sequences = _read_shard(path)
        if [sequence.prompt for sequence in sequences] != list(prompts):
            raise InputError(f"{path} does not hold the prompts that it should; delete it and run ht-train data again")
        self._names.append(path.name)
        return sequences

    def write_shard(self, turn: int, number: int, sequences: Iterable[AnsweredPrompt]) -> None:
        """Write one shard, whole or not at all."""
        path = self._shard_path(turn, number)
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(asdict(sequence)) + "\n" for sequence in sequences))
        self._names.append(path.name)

    def finish(self, **counts: int) -> None:
        """Record that every shard is there, with `counts` about them, `sequences` being one."""
        write_json(self.path / MANIFEST, {**self.manifest, "shards": sorted(self._names), **counts})

    def _shard_path(self, turn: int, number: int) -> Path:
        return self.path / f"shard-{turn}-{number:05d}.jsonl"


def read_data(folder: Path, base: BaseModel, min_answer_tokens: int) -> list[AnsweredPrompt]:
    """Read the sequences of a data folder whose answers have at least `min_answer_tokens` tokens.

    Raises `InputError` when the folder is unfinished, or was made with other weights than `base` has.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} is not a data folder (no {MANIFEST}); make one with: ht-train data")
    manifest = _read_manifest(path)
    made_with = manifest["base_model"]["weights_sha256"]
    if made_with != base.weights_sha256:
        raise InputError(
            f"{folder} was made with other weights ({manifest['base_model']['name']}, {made_with[:12]}) than "
            f"{base.source} ({base.weights_sha256[:12]}); make it again with: ht-train data"
        )
    expected = manifest["shards"]
    if expected is None:
        raise InputError(f"{folder} is not finished; run ht-train data again with the same settings")
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(expected)} shards (first: {missing[0]}); "
            "run ht-train data again with the same settings"
        )
    written = [sequence for name in expected for sequence in _read_shard(folder / name)]
    if len(written) != manifest["sequences"]:
        raise InputError(
            f"{folder} holds {len(written)} of {manifest['sequences']} answers; a shard was cut short: "
            "delete the shards and make the data again"
        )
    if max(max(sequence.tokens) for sequence in written) >= base.model.config.vocab_size:
        raise InputError(f"{folder} holds token ids beyond the model's vocabulary; make the data again")
    sequences = [sequence for sequence in written if len(sequence.answer) >= min_answer_tokens]
    if not sequences:
        raise InputError(
            f"{folder} holds no answer of at least {min_answer_tokens} tokens, one more than there are draft steps; "
            "make longer ones with --max-new-tokens"
        )
    return sequences


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
        if version == MANIFEST_VERSION:
            _check_manifest(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); delete its folder and make the data again") from error
    if version != MANIFEST_VERSION:
        raise InputError(
            f"{path} is of version {version}; this release reads version {MANIFEST_VERSION}: "
            "update hidden-transfer, or make the data again"
        )
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise `KeyError`, `TypeError` or `ValueError` unless the manifest has what is read of it."""
    made_by, shards = manifest["base_model"], manifest["shards"]
    if not isinstance(made_by["weights_sha256"], str) or not isinstance(made_by["name"], str):
        raise ValueError("base_model must have a name and a hash")
    if shards is None:
        return
    if not isinstance(shards, list) or not all(isinstance(name, str) for name in shards):
        raise ValueError("shards must be a list of names")
    if not isinstance(manifest["sequences"], int):
        raise ValueError("sequences must be a number")


def _read_shard(path: Path) -> list[AnsweredPrompt]:
    try:
        return [_sequence(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run ht-train data again") from error


def _sequence(row: dict[str, Any]) -> AnsweredPrompt:
    sequence = AnsweredPrompt(**row)
    for name in ("prompt", "answer"):
        ids = getattr(sequence, name)
        if not isinstance(ids, list) or not ids or not all(isinstance(token, int) and token >= 0 for token in ids):
            raise ValueError(f"{name} must be a list of token ids")
    if not isinstance(sequence.task, str):
        raise ValueError("task must be a string")
    return sequence
