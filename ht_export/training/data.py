"""The data folder: self-distillation text in shards, and the manifest that says what it was made from.

`manifest.json` names the base model, the prompts and the settings; `shard-0-00000.jsonl` (turn, number) and so on
hold one answer a line: `{"id": ..., "task": ..., "prompt": [token ids], "answer": [token ids]}`. The prompt of a later
turn holds the turns and answers before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Required, TypedDict

from msgspec import Meta

from ht_export.formats import LinesFormat, VersionedFormat
from ht_export.model.checkpoint import BaseModel
from ht_export.training.identity import first_difference
from runtime.errors import InputError, one_line
from runtime.files import atomic_path, write_json

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
# Ids are kept in 32 bits elsewhere.
MOST_TOKEN = (1 << 31) - 1


Tokens = Annotated[list[Annotated[int, Meta(ge=0, le=MOST_TOKEN)]], Meta(min_length=1)]


@dataclass(frozen=True)
class AnsweredPrompt:
    """One prompt with the base model's answer, as token ids; neither is empty."""

    id: str
    task: str
    prompt: Tokens
    answer: Tokens

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def tokens(self) -> list[int]:
        """The whole text."""
        return self.prompt + self.answer


class _MadeBy(TypedDict, total=False):
    """The base model's identity; see `BaseModel.identity`."""

    name: Required[str]
    weights_sha256: Required[str]
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int


@dataclass(frozen=True)
class Manifest:
    """The data a folder holds, and what it was made from. `shards` and the number of `sequences` are None until all are
    there; `engine_sha256` is that of the weights of a quantised engine, whose text is its own.
    """

    version: int
    base_model: _MadeBy
    shards: list[Annotated[str, Meta(pattern=r"\Ashard-\d+-\d+\.jsonl\Z")]] | None
    sequences: Annotated[int, Meta(ge=0)] | None = None
    dtype: str | None = None
    engine_sha256: str | None = None
    prompts_sha256: str | None = None
    excluded_sha256: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shards is not None and self.sequences is None:
            raise ValueError("it names shards without the number of their sequences")
        if len(set(self.shards or ())) < len(self.shards or ()):
            raise ValueError("it names a shard twice")


MANIFESTS = VersionedFormat(
    "manifest of data",
    most_bytes=1 << 26,
    remedy="delete its folder and make the data again",
    kind=Manifest,
    version=MANIFEST_VERSION,
    again="make the data again",
)
SHARDS = LinesFormat(
    "answered prompt",
    most_bytes=1 << 26,
    remedy="delete the file and run ht-train data again",
    kind=AnsweredPrompt,
)


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
            differing = first_difference(self.manifest, asdict(MANIFESTS.read(existing)))
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
    manifest = MANIFESTS.read(path)
    made_by = manifest.base_model
    if made_by["weights_sha256"] != base.weights_sha256:
        raise InputError(
            f"{folder} was made with other weights ({one_line(made_by['name'])}, "
            f"{one_line(made_by['weights_sha256'][:12])}) than "
            f"{base.source} ({base.weights_sha256[:12]}); make it again with: ht-train data"
        )
    expected = manifest.shards
    if expected is None:
        raise InputError(f"{folder} is not finished; run ht-train data again with the same settings")
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(expected)} shards (first: {missing[0]}); "
            "run ht-train data again with the same settings"
        )
    written = read_answers(folder, manifest)
    if max((max(sequence.tokens) for sequence in written), default=0) >= base.model.config.vocab_size:
        raise InputError(f"{folder} holds token ids beyond the model's vocabulary; make the data again")
    sequences = [sequence for sequence in written if len(sequence.answer) >= min_answer_tokens]
    if not sequences:
        raise InputError(
            f"{folder} holds no answer of at least {min_answer_tokens} tokens, one more than there are draft steps; "
            "make longer ones with --max-new-tokens"
        )
    return sequences


def read_answers(folder: Path, manifest: Manifest) -> list[AnsweredPrompt]:
    """Return the answers of a finished folder, whose shards are all there. Raises `InputError` where one was cut."""
    written = [sequence for name in manifest.shards or () for sequence in _read_shard(folder / name)]
    if len(written) != manifest.sequences:
        raise InputError(
            f"{folder} holds {len(written)} of {manifest.sequences} answers; a shard was cut short: "
            "delete the shards and make the data again"
        )
    return written


def is_whole(folder: Path) -> bool:
    """Return whether a data folder is finished, with every shard there. Raises `InputError` for a damaged manifest."""
    shards = MANIFESTS.read(folder / MANIFEST).shards
    return shards is not None and all((folder / name).is_file() for name in shards)


def long_answers(folder: Path, min_answer_tokens: int) -> int:
    """Return how many answers of a finished data folder have at least so many tokens. Raises `InputError`."""
    shards = MANIFESTS.read(folder / MANIFEST).shards or ()
    return sum(len(one.answer) >= min_answer_tokens for name in shards for one in _read_shard(folder / name))


def _read_shard(path: Path) -> list[AnsweredPrompt]:
    return [sequence for _, sequence in SHARDS.lines(path)]
