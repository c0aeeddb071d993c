"""Self-distillation text: the base model's own answers to prompts, greedy or sampled, turn by turn."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from transformers import GenerationConfig

from ht_export.model.checkpoint import BaseModel
from ht_export.prompts import Conversation, encode_chat, read_conversations, without_duplicates
from ht_export.training.data import AnsweredPrompt, DataFolder
from runtime.errors import InputError
from runtime.files import sha256_file
from runtime.sampling.options import LEAST_FACTOR


@dataclass(frozen=True)
class DataSettings:
    """Options of making self-distillation text.

    `max_prompts` None takes all; lengths are in tokens. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 keep all
    tokens. `max_turns` is how many turns of a conversation are answered.
    """

    max_prompts: int | None = None
    max_turns: int = 1
    max_prompt_tokens: int = 256
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_prompts", "max_turns", "max_prompt_tokens", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, not {self.seed}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise InputError(
                "temperature and top_k must be at least 0, and top_p above 0 and at most 1; "
                f"not {self.temperature}, {self.top_k} and {self.top_p}"
            )
        if 0 < self.temperature < LEAST_FACTOR:
            raise InputError(f"temperature must be 0 (greedy) or at least {LEAST_FACTOR}, not {self.temperature}")

    def decoding(self) -> dict[str, Any]:
        """Return these settings as arguments of `transformers.generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def generate_data(
    base: BaseModel,
    prompts_file: Path,
    folder: Path,
    settings: DataSettings,
    progress: Progress,
    excluded_file: Path | None = None,
) -> None:
    """Write the base model's answers to `folder`, going on where an earlier run with these settings stopped.

    Conversations that begin as one in `excluded_file` does are left out: held-out prompts, say. Raises `InputError`.
    """
    room = base.model.config.max_position_embeddings - settings.max_new_tokens
    if room < 1:
        raise InputError(
            f"answers of {settings.max_new_tokens} tokens leave no room for a prompt in the model's context of "
            f"{base.model.config.max_position_embeddings}; lower --max-new-tokens"
        )
    longest = min(settings.max_prompt_tokens, room)
    conversations = read_conversations(prompts_file)
    excluded = read_conversations(excluded_file) if excluded_file else []
    distinct = without_duplicates(conversations, excluded, settings.max_turns)
    if not distinct:
        raise InputError(f"{prompts_file}: every prompt is in {excluded_file}; give other prompts to train on")
    out = DataFolder(
        folder,
        {
            "base_model": base.identity(),
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "prompts_sha256": sha256_file(prompts_file),
            "excluded_sha256": sha256_file(excluded_file) if excluded_file else None,
            "settings": asdict(settings),
        },
    )
    random.Random(settings.seed).shuffle(distinct)
    chosen = distinct[: settings.max_prompts]
    answers: list[list[str]] = [[] for _ in chosen]
    written: list[AnsweredPrompt] = []
    too_long = 0
    for turn in range(min(settings.max_turns, max(len(conversation.turns) for conversation in chosen))):
        due = [i for i, c in enumerate(chosen) if len(c.turns) > turn and len(answers[i]) == turn]
        encoded = [(i, encode_chat(base.tokenizer, chosen[i].turns[: turn + 1], answers[i])) for i in due]
        fitting = [item for item in encoded if len(item[1]) <= longest]
        too_long += len(encoded) - len(fitting)
        if turn == 0 and not fitting:
            shortest = min(len(ids) for _, ids in encoded)
            raise InputError(
                f"{prompts_file}: no prompt has at most {longest} tokens (the shortest has "
                f"{shortest}); raise --max-prompt-tokens"
            )
        for i, sequence in _answer_turn(base, chosen, fitting, out, turn, settings, progress):
            answers[i].append(base.tokenizer.decode(sequence.answer, skip_special_tokens=True))
            written.append(sequence)
    out.finish(
        sequences=len(written),
        answer_tokens=sum(len(sequence.answer) for sequence in written),
        duplicates_or_excluded=len(conversations) - len(distinct),
        too_long=too_long,
    )


def _answer_turn(
    base: BaseModel,
    conversations: list[Conversation],
    prompts: list[tuple[int, list[int]]],
    out: DataFolder,
    turn: int,
    settings: DataSettings,
    progress: Progress,
) -> Iterator[tuple[int, AnsweredPrompt]]:
    """Yield (conversation, sequence) for each prompt (conversation, ids), from its shard if there is one."""
    ordered = sorted(prompts, key=lambda item: len(item[1]))
    batches = [ordered[i : i + settings.batch_size] for i in range(0, len(ordered), settings.batch_size)]
    bar = progress.add_task(f"turn {turn + 1}", total=len(batches))
    # The longest first: too little memory shows at once, and the remaining time is never guessed too short.
    for number, batch in reversed(list(enumerate(batches))):
        sequences = out.shard(turn, number, [ids for _, ids in batch])
        if sequences is None:
            started = perf_counter()
            # Each shard has its own draws, so that a resumed run samples what an unbroken one does.
            seed = int(np.random.SeedSequence([settings.seed, turn, number]).generate_state(1)[0])
            found = answer(base, [ids for _, ids in batch], settings, seed)
            sequences = [
                AnsweredPrompt(f"{conversations[i].id}/{turn + 1}", conversations[i].task, ids, tokens)
                for (i, ids), tokens in zip(batch, found, strict=True)
            ]
            out.write_shard(turn, number, sequences)
            speed = sum(map(len, found)) / (perf_counter() - started)
            progress.update(bar, description=f"turn {turn + 1}, {speed:,.0f} tokens/s")
        progress.advance(bar)
        yield from zip((i for i, _ in batch), sequences, strict=True)


def answer(base: BaseModel, prompts: list[list[int]], settings: DataSettings, seed: int = 0) -> list[list[int]]:
    """Return the continuation of each prompt, end-of-text token included, from one left-padded batch."""
    model = base.model
    stops = base.stop_tokens()
    pad = base.tokenizer.pad_token_id
    if pad is None:
        pad = stops[0] if stops else 0
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        # Not with the model's own generation settings, which `generate` falls back on wherever ours say nothing: a
        # repetition penalty, say, would make other text than decoding does.
        own = model.generation_config
        model.generation_config = GenerationConfig()
        try:
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                eos_token_id=stops or None,
                pad_token_id=pad,
                max_new_tokens=settings.max_new_tokens,
                **settings.decoding(),
            )
        finally:
            model.generation_config = own
    return [_until_stop(row, stops) for row in output[:, width:].tolist()]


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    for index, token in enumerate(ids):
        if token in stops:
            return ids[: index + 1]
    return ids
