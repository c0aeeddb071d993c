"""Self-distillation text: the base model's own answers to prompts, greedy or sampled, turn by turn.

They are made by an engine of the model, which answers many prompts at once and speculates: the text is the base model's
either way, and a prompt has the answer that it has alone.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.progress import Progress

from ht_export.prompts import Conversation, read_conversations, without_duplicates
from ht_export.training.data import AnsweredPrompt, DataFolder
from runtime import Generator, Sampling, Tokens
from runtime.errors import InputError
from runtime.files import sha256_file
from runtime.request import Request
from runtime.sampling.options import LEAST_FACTOR

# Shards that are answered while one is waited for: with fewer, the last answers of a shard would run alone.
AHEAD = 2
MOST_PARTS = 1 << 16


@dataclass(frozen=True)
class Part:
    """The conversations `number`, `number` + `of`, ... of all, counted from 1: what one of `of` machines answers."""

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of <= MOST_PARTS:
            raise InputError(f"part must be I/N with I from 1 to N, and N up to {MOST_PARTS}, not {self}")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class DataSettings:
    """Options of making self-distillation text.

    `max_prompts` None takes all; lengths are in tokens. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 keep all
    tokens. `max_turns` is how many turns of a conversation are answered, `shard_size` how many answers a file has.
    """

    max_prompts: int | None = None
    max_turns: int = 1
    max_prompt_tokens: int = 256
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    shard_size: int = 64
    seed: int = 0
    part: Part = Part()

    def __post_init__(self) -> None:
        for name in ("max_prompts", "max_turns", "max_prompt_tokens", "max_new_tokens", "shard_size"):
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

    def sampling(self, turn: int, conversation: int) -> Sampling:
        """Return how the answer to a turn is drawn: each has its own draws, whatever runs beside it."""
        if self.temperature == 0:
            return Sampling()
        seed = int(np.random.SeedSequence([self.seed, turn, conversation]).generate_state(1, np.uint64)[0])
        return Sampling(temperature=self.temperature, top_k=self.top_k or None, top_p=self.top_p, seed=seed)


def generate_data(
    generator: Generator,
    prompts_file: Path,
    folder: Path,
    settings: DataSettings,
    progress: Progress,
    excluded_file: Path | None = None,
) -> None:
    """Write the base model's answers to `folder`, going on where an earlier run with these settings stopped.

    Conversations that begin as one in `excluded_file` does are left out: held-out prompts, say. Raises `InputError`.
    """
    room = generator.about.max_context - settings.max_new_tokens
    if room < 1:
        raise InputError(
            f"answers of {settings.max_new_tokens} tokens leave no room for a prompt in the model's context of "
            f"{generator.about.max_context}; lower --max-new-tokens"
        )
    longest = min(settings.max_prompt_tokens, room)
    conversations = read_conversations(prompts_file)
    excluded = read_conversations(excluded_file) if excluded_file else []
    distinct = without_duplicates(conversations, excluded, settings.max_turns)
    if not distinct:
        raise InputError(f"{prompts_file}: every prompt is in {excluded_file}; give other prompts to train on")
    out = DataFolder(folder, made_with(generator, prompts_file, excluded_file, settings))
    random.Random(settings.seed).shuffle(distinct)
    part = settings.part
    chosen = dict(list(enumerate(distinct[: settings.max_prompts]))[part.number - 1 :: part.of])
    if not chosen:
        raise InputError(f"{prompts_file}: part {part} has no prompt; make fewer parts")
    answers: dict[int, list[str]] = {i: [] for i in chosen}
    written: list[AnsweredPrompt] = []
    too_long = same_tokens = 0
    # Other words may be the same tokens to the model: those that its tokenizer does not know, say.
    apart = {tuple(encode(generator, one.turns[:1], [])) for one in excluded}
    for turn in range(min(settings.max_turns, max(len(conversation.turns) for conversation in chosen.values()))):
        due = [i for i, c in chosen.items() if len(c.turns) > turn and len(answers[i]) == turn]
        encoded = [(i, encode(generator, chosen[i].turns[: turn + 1], answers[i])) for i in due]
        if turn == 0:
            encoded = [item for item in encoded if tuple(item[1]) not in apart]
            same_tokens = len(due) - len(encoded)
            if not encoded:
                raise InputError(
                    f"{prompts_file}: to this model every prompt{f' of part {part}' if part.of > 1 else ''} is one in "
                    f"{excluded_file}; give other prompts to train on"
                )
        fitting = [item for item in encoded if len(item[1]) <= longest]
        too_long += len(encoded) - len(fitting)
        if turn == 0 and not fitting:
            shortest = min(len(ids) for _, ids in encoded)
            raise InputError(
                f"{prompts_file}: no prompt has at most {longest} tokens (the shortest has "
                f"{shortest}); raise --max-prompt-tokens"
            )
        for i, sequence in _answer_turn(generator, chosen, fitting, out, turn, settings, progress):
            answers[i].append(generator.decode(sequence.answer))
            written.append(sequence)
    out.finish(
        sequences=len(written),
        answer_tokens=sum(len(sequence.answer) for sequence in written),
        duplicates_or_excluded=len(conversations) - len(distinct) + same_tokens,
        too_long=too_long,
    )


def made_with(
    generator: Generator, prompts_file: Path, excluded_file: Path | None, settings: DataSettings
) -> dict[str, Any]:
    """Return what the text depends on. In float32 that is the model, whatever engine computes it; a quantised engine
    has a text of its own.
    """
    about = generator.about
    quantised = about.precision not in ("float32", "float16", "bfloat16")
    weights = about.weights or about.graph
    return {
        "base_model": about.base_model,
        "dtype": about.precision,
        "engine_sha256": weights.sha256 if quantised else None,
        "prompts_sha256": sha256_file(prompts_file),
        "excluded_sha256": sha256_file(excluded_file) if excluded_file else None,
        "settings": asdict(settings) | {"part": str(settings.part)},
    }


def encode(generator: Generator, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
    """Return the ids of a conversation up to where the model speaks: `turns` with an answer after each but the last, in
    the model's chat template; without one the bare texts follow each other.
    """
    said = [*(text for pair in zip(turns, answers, strict=False) for text in pair), turns[-1]]
    if generator.about.chat_template is None:
        return generator.encode("".join(said), raw=True)
    roles = ("user", "assistant")
    return generator.encode([{"role": roles[place % 2], "content": text} for place, text in enumerate(said)])


@dataclass(frozen=True)
class _UnderWay:
    """A shard whose answers are being made: its `number`, the conversations and their prompts, and the requests."""

    number: int
    prompts: list[tuple[int, list[int]]]
    requests: list[Request]


def _answer_turn(
    generator: Generator,
    conversations: dict[int, Conversation],
    prompts: list[tuple[int, list[int]]],
    out: DataFolder,
    turn: int,
    settings: DataSettings,
    progress: Progress,
) -> Iterator[tuple[int, AnsweredPrompt]]:
    """Yield (conversation, sequence) for each prompt (conversation, ids), from its shard if there is one."""
    ordered = sorted(prompts, key=lambda item: len(item[1]))
    size = settings.shard_size
    shards = [(number, ordered[at : at + size]) for number, at in enumerate(range(0, len(ordered), size))]
    bar = progress.add_task(f"turn {turn + 1}", total=len(ordered))
    under_way: deque[_UnderWay] = deque()
    begun, tokens = perf_counter(), 0

    def begin(number: int, shard: list[tuple[int, list[int]]]) -> _UnderWay:
        most = settings.max_new_tokens
        asked = [
            generator.submit(Tokens(ids), max_new_tokens=most, sampling=settings.sampling(turn, i)) for i, ids in shard
        ]
        return _UnderWay(number, shard, asked)

    def finished(shard: _UnderWay) -> Iterator[tuple[int, AnsweredPrompt]]:
        nonlocal tokens
        sequences = []
        for (i, ids), request in zip(shard.prompts, shard.requests, strict=True):
            answer = request.result().tokens
            of = conversations[i]
            sequences.append(AnsweredPrompt(f"{of.id}/{turn + 1}", of.task, ids, answer))
            tokens += len(answer)
            speed = tokens / (perf_counter() - begun)
            progress.update(bar, description=f"turn {turn + 1}, {speed:,.0f} tokens/s")
            progress.advance(bar)
        out.write_shard(turn, shard.number, sequences)
        yield from zip((i for i, _ in shard.prompts), sequences, strict=True)

    try:
        # The longest first: too little memory shows at once, and the remaining time is never guessed too short.
        for number, shard in reversed(shards):
            written = out.shard(turn, number, [ids for _, ids in shard])
            if written is not None:
                progress.advance(bar, len(shard))
                yield from zip((i for i, _ in shard), written, strict=True)
                continue
            under_way.append(begin(number, shard))
            if len(under_way) > AHEAD:
                yield from finished(under_way[0])
                under_way.popleft()
        while under_way:
            yield from finished(under_way[0])
            under_way.popleft()
    finally:
        for request in (request for shard in under_way for request in shard.requests):
            request.cancel()
