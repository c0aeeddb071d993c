"""Self-distillation text: the base model's own greedy answers to a file of prompts, in shards that resume.

A data folder holds `manifest.json` (what the text was made from) and `shard-00000.jsonl`, ..., one line a sequence:
`{"id": ..., "task": ..., "prompt": [token ids], "answer": [token ids]}`.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ht_export.checkpoint import BaseModel
from runtime.errors import InputError
from runtime.files import atomic_path, sha256_file, write_json

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class DataSettings:
    """How self-distillation text is made. `max_prompts` None takes all; lengths are in tokens."""

    max_prompts: int | None = None
    max_prompt_tokens: int = 256
    max_new_tokens: int = 128
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_prompts", "max_prompt_tokens", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class Sequence:
    """One prompt with the base model's greedy answer, as token ids."""

    id: str
    task: str
    prompt: list[int]
    answer: list[int]


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file of prompts: each line has `prompt` (a string) or `turns` (a list; the first is used).

    Optional fields: `id`, `task`. Raises `InputError` with the line number of the first line that does not fit.
    """
    if not path.is_file():
        raise InputError(f"no prompts file at {path}; give a JSON-lines file with a 'prompt' on each line")
    prompts = []
    # Not splitlines(): JSON strings may hold other Unicode line separators unescaped.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            # Decoded here: text that is not UTF-8 has a line number too.
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error})") from error
        text = _first_turn(row) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise InputError(f"{path}, line {number}: needs 'prompt' (a string) or 'turns' (a list of strings)")
        prompts.append({"id": str(row.get("id", number)), "task": str(row.get("task", "")), "text": text})
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    return prompts


def _first_turn(row: dict[str, Any]) -> Any:
    turns = row.get("turns")
    return row.get("prompt") or (turns[0] if isinstance(turns, list) and turns else None)


def encode_prompt(base: BaseModel, text: str) -> list[int]:
    """Return the ids of one user message in the model's chat template, or of the bare text when it has none."""
    if not base.tokenizer.chat_template:
        return list(base.tokenizer(text).input_ids)
    return list(
        base.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


def generate_data(
    base: BaseModel, prompts_file: Path, folder: Path, settings: DataSettings, progress: Progress
) -> None:
    """Write the base model's greedy answers to `folder`, going on where an earlier run with these settings stopped."""
    manifest = {
        "version": MANIFEST_VERSION,
        "base_model": base.identity(),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "prompts_sha256": sha256_file(prompts_file) if prompts_file.is_file() else "",
        "settings": asdict(settings),
    }
    prompts = read_prompts(prompts_file)
    _check_resumable(folder, manifest)
    random.Random(settings.seed).shuffle(prompts)
    encoded = [(row, encode_prompt(base, row["text"])) for row in prompts[: settings.max_prompts]]
    encoded = [item for item in encoded if len(item[1]) <= settings.max_prompt_tokens]
    if not encoded:
        raise InputError(
            f"{prompts_file}: every prompt is longer than {settings.max_prompt_tokens} tokens; "
            "raise --max-prompt-tokens"
        )
    encoded.sort(key=lambda item: len(item[1]))
    batches = [encoded[i : i + settings.batch_size] for i in range(0, len(encoded), settings.batch_size)]
    write_json(folder / MANIFEST, {**manifest, "shards": len(batches), "sequences": len(encoded)})
    task = progress.add_task("generating", total=len(batches))
    for index, batch in enumerate(batches):
        shard = folder / f"shard-{index:05d}.jsonl"
        if not shard.exists():
            answers = greedy_answers(base, [ids for _, ids in batch], settings.max_new_tokens)
            with atomic_path(shard) as temporary:
                temporary.write_text(
                    "".join(
                        json.dumps({"id": row["id"], "task": row["task"], "prompt": ids, "answer": answer}) + "\n"
                        for (row, ids), answer in zip(batch, answers, strict=True)
                    )
                )
        progress.advance(task)


def greedy_answers(base: BaseModel, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Return each prompt's greedy continuation, end-of-text token included, from one left-padded batch."""
    model = base.model
    stops = base.stop_tokens()
    pad = base.tokenizer.pad_token_id if base.tokenizer.pad_token_id is not None else stops[0]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad
        )
    return [_until_stop(row, stops) for row in output[:, width:].tolist()]


def read_data(folder: Path, base: BaseModel, min_answer_tokens: int) -> list[Sequence]:
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
    shards = sorted(folder.glob("shard-*.jsonl"))
    if len(shards) != manifest["shards"]:
        raise InputError(
            f"{folder} has {len(shards)} of {manifest['shards']} shards; finish it by running ht-train data again"
        )
    sequences = [s for shard in shards for s in _read_shard(shard) if len(s.answer) >= min_answer_tokens]
    if not sequences:
        raise InputError(f"{folder} holds no answer of at least {min_answer_tokens} tokens")
    return sequences


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, _, _ = manifest["version"], manifest["shards"], manifest["base_model"]["weights_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); delete its folder and make the data again") from error
    if version != MANIFEST_VERSION:
        raise InputError(
            f"{path} is of version {version}; this release reads version {MANIFEST_VERSION}: "
            "update hidden-transfer, or make the data again"
        )
    return manifest


def _read_shard(path: Path) -> list[Sequence]:
    try:
        return [Sequence(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run ht-train data again") from error


def _check_resumable(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / MANIFEST
    if not path.is_file():
        return
    earlier = _read_manifest(path)
    differing = [key for key, value in manifest.items() if earlier.get(key) != value]
    if differing:
        raise InputError(
            f"{folder} holds data made with another {differing[0]}; choose a new folder, or repeat the earlier settings"
        )


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    for index, token in enumerate(ids):
        if token in stops:
            return ids[: index + 1]
    return ids
